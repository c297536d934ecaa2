"""Small writing: the same scenes on a larger canvas."""

from benchmarks.bench_look_again import spread
from training.examples import example_rng
from training.scenes import sample_scene


def test_what_is_spread_keeps_its_size_and_its_place_among_the_others() -> None:
    scenes = [sample_scene(example_rng("held_out", 0, index), "held_out") for index in range(40)]
    written = [scene for scene in scenes if scene.writing is not None and scene.things]
    assert written
    for scene in written:
        wide = spread(scene, 3)
        assert (wide.width, wide.height) == (3 * scene.width, 3 * scene.height)
        assert [(thing.name, thing.size) for thing in wide.things] == [(each.name, each.size) for each in scene.things]
        assert [(thing.x, thing.y) for thing in wide.things] == [(3 * each.x, 3 * each.y) for each in scene.things]
        assert wide.writing is not None
        assert scene.writing is not None
        assert (wide.writing.text, wide.writing.height) == (scene.writing.text, scene.writing.height)
        assert wide.writing.boxes[-1][2] < wide.width
        assert spread(scene, 1) == scene
