"""The page itself, of Gradio's components: what is typed and shown where.

Gradio is imported when a page is made, because it is optional.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimserve.client import Client
from trimserve.connection import Connection
from trimserve.errors import CannotListen, InvalidRequest
from trimserve.imaging.decode import decode_image
from trimserve.playground.asking import Seen, ask
from trimserve.playground.samples import samples
from trimserve.playground.setting import OFF, Question, Setting, policy_names
from trimserve.playground.snippets import as_curl, as_python
from trimserve.v1 import model_pb2

__all__ = ["Server", "opened"]

_ABOUT = """## trimserve playground
**{model}**: what a question keeps of an image, under two settings. What is *lit* stays in the cache as it is; *heat* is
how many heads picked a patch. The *budget* is `k_ratio`, of a head; of policies that choose before the decoder it is
the share of the image that stays. The settings are asked one after the other, so that neither slows the other."""

_CSS = ".gradio-container {max-width: 1500px !important} [id$=-account] thead {display: none}"

_MAX_FILE_BYTES = 64 * 2**20
"""Of an upload."""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom the page asks, and how a copied request reaches it."""

    client: Client
    model: model_pb2.GetModelResponse
    connection: Connection
    """With an address."""
    http_address: str


@dataclass(frozen=True, slots=True)
class _Side:
    """Components of one setting."""

    controls: list[Any]
    """Policy, budget and merge ratio."""
    text: Any
    kept: Any
    votes: Any
    account: Any
    python: Any
    curl: Any

    @property
    def outputs(self) -> list[Any]:
        return [self.text, self.kept, self.votes, self.account, self.python, self.curl]


def opened(server: Server, host: str, port: int) -> Any:
    """A page that is being served; its `close` ends it, `local_url` is where it is.

    Args:
        server: that is asked.
        host: to listen on.
        port: to listen on; 0 takes a free one.
    Raises:
        ImportError: Gradio is not installed.
        CannotListen: the port is taken, or the host is not ours.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would tell its makers, and ask for news of them
    _spare_proxies(host)
    import gradio

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page = _page(gradio, server)
    try:
        page.launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            theme=theme,
            css=_CSS,
            footer_links=[],
            max_file_size=_MAX_FILE_BYTES,
        )
    except OSError:  # its text names a variable of Gradio's
        where = f"{host}:{port} (--page-host, --page-port)"
        raise CannotListen(f"cannot listen on {where}: taken, or not an address of this machine") from None
    return page


def _spare_proxies(host: str) -> None:
    """Gradio looks at its own page when it begins, and would ask a proxy of the environment for it."""
    spared = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", host)
    os.environ["no_proxy"] = ",".join(each for each in spared if each)


def _page(gr: Any, server: Server) -> Any:
    with gr.Blocks(title="trimserve playground", analytics_enabled=False) as page:
        gr.Markdown(_ABOUT.format(model=server.model.model_id))
        with gr.Row():
            with gr.Column(scale=2):
                # As the file is: the server shall see its very bytes.
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    height=300,
                    elem_id="image",
                )
                question = gr.Textbox(label="Question", value="What do you see?", elem_id="question")
                most = gr.Slider(1, 512, 64, step=1, label="max_new_tokens")
                temperature = gr.Slider(0, 2, 0, step=0.1, label="temperature (0 is greedy)")
                button = gr.Button("Ask both", variant="primary", elem_id="ask")
                gr.Examples([[*each] for each in samples()], [image, question], label="Samples", examples_per_page=20)
                with gr.Accordion("Policies", open=False):
                    gr.Markdown("\n".join(f"- **{each.name}**: {each.summary}" for each in server.model.policy_details))
            first = server.model.policies[0]
            sides = [_side(gr, server, name, policy) for name, policy in (("A", first), ("B", OFF))]
        asked = [image, question, most, temperature]
        _connect(gr, server, asked, sides, [button.click, question.submit])
    return page


def _side(gr: Any, server: Server, name: str, policy: str) -> _Side:
    model = server.model
    with gr.Column(scale=3, elem_id=f"{name}-side"):
        chosen = gr.Dropdown(policy_names(model), value=policy, label=f"{name}: policy")
        with gr.Row():
            budget = gr.Slider(0.01, 1, model.default_k_ratio, step=0.01, label="budget", min_width=120)
            merged = gr.Slider(0, 1, model.default_merge_ratio, step=0.01, label="merge_ratio", min_width=120)
        text = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id=f"{name}-answer")
        with gr.Row():
            kept = _picture(gr, "kept features lit", f"{name}-kept")
            votes = _picture(gr, "votes of the heads", f"{name}-votes")
        account = gr.Markdown(elem_id=f"{name}-account")
        with gr.Accordion("This request as Python and curl", open=False):
            python = gr.Code(label="Python", language="python", interactive=False, elem_id=f"{name}-python")
            curl = gr.Code(label="curl", language="shell", interactive=False, elem_id=f"{name}-curl")
    return _Side([chosen, budget, merged], text, kept, votes, account, python, curl)


def _picture(gr: Any, caption: str, elem_id: str) -> Any:
    with gr.Column(min_width=120):
        gr.Markdown(caption)  # a label would lie on the picture
        return gr.Image(interactive=False, show_label=False, buttons=["fullscreen"], elem_id=elem_id, format="png")


def _connect(gr: Any, server: Server, asked: list[Any], sides: list[_Side], asks_both: list[Any]) -> None:
    """Both sides answer, one after the other, to these events, and each to its own controls."""

    def answered(side: _Side) -> Any:
        """What a click does for one side of the page."""

        def answer(
            path: str | None, text: str, most: int, temperature: float, policy: str, budget: float, merge_ratio: float
        ) -> Iterator[dict[Any, Any]]:
            question = Question(text, None if path is None else Path(path).read_bytes(), most, temperature)
            yield from _answer(server, side, question, Setting(policy, budget, merge_ratio), path)

        return answer

    handlers = [answered(side) for side in sides]
    for event in asks_both:
        running = event(handlers[0], [*asked, *sides[0].controls], sides[0].outputs, api_visibility="private")
        running.then(handlers[1], [*asked, *sides[1].controls], sides[1].outputs, api_visibility="private")
    for handler, side in zip(handlers, sides, strict=True):
        policy, *sliders = side.controls
        gr.on(
            [policy.input, *(slider.release for slider in sliders)],
            handler,
            [*asked, *side.controls],
            side.outputs,
            trigger_mode="always_last",
            api_visibility="private",
        )


def _answer(
    server: Server, side: _Side, question: Question, setting: Setting, path: str | None
) -> Iterator[dict[Any, Any]]:
    """What changes on a side, time by time."""
    request = question.request(setting, server.model)
    name = None if path is None else Path(path).name
    yield {
        side.text: "",
        side.kept: None,
        side.votes: None,
        side.account: "",
        side.python: as_python(request, server.connection, name),
        side.curl: as_curl(request, server.model.model_id, server.connection, server.http_address, name),
    }
    try:
        picture = (
            None if question.image is None else decode_image(question.image, "image", server.model.max_image_pixels)
        )
    except InvalidRequest as error:
        yield {side.text: str(error)}
        return
    for seen in ask(server.client, request, picture, server.model.tile_size):
        yield _changes(side, seen)


def _changes(side: _Side, seen: Seen) -> dict[Any, Any]:
    changed = {side.kept: seen.kept, side.votes: seen.votes, side.account: seen.account}
    return {side.text: seen.text, **{component: value for component, value in changed.items() if value is not None}}
