"""The playground in a real browser, as a person uses it.

A picture is uploaded, a question asked; the first letter must be shown before the rest of the answer is known, and the
whole must be the server's answer; a slider is moved, and another picture shown; the request is copied as Python and as
curl, and both must get the same answer. The page may ask nobody but this machine. A screenshot of it becomes the
documentation's.

Runs where Gradio and Playwright are (`requirements/playground.txt`), with Debian's `chromium`.

Usage: python -m scripts.verify.playground --python PYTHON_OF_THE_SERVER [--out FILE]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from playwright.sync_api import Page, expect, sync_playwright

from trimserve.client import Client
from trimserve.playground.setting import OFF, Question, Setting
from trimserve.process import server_process
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]

SAMPLES = ROOT / "trimserve/assets/samples"
PICTURE, QUESTION = SAMPLES / "mixed.png", "What do you see?"
OTHER_PICTURE, OTHER_QUESTION = SAMPLES / "scene.png", "What colour is the star?"
OUT = ROOT / "docs/images/playground.png"
CHROMIUM = "/usr/bin/chromium"
PATIENCE_MS = 60_000.0


class Relay(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Hands calls on to a server. Each answer stops behind its first letter until it may go on."""

    def __init__(self, client: Client) -> None:
        """Let answers go on.

        Args:
            client: of the server.
        """
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._client = client

    def Generate(  # noqa: N802 the RPC's name
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        """See the contract."""
        del context
        return self._client.generate(request)

    def GenerateStream(  # noqa: N802 the RPC's name
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        """See the contract."""
        del context
        for event in self._client.stream(request):
            if event.delta.text and not self.may_go_on.is_set():
                yield pb.GenerateStreamResponse(delta=pb.TokenDelta(text=event.delta.text[:1]))
                self.may_go_on.wait(PATIENCE_MS / 1000)
                event.delta.text = event.delta.text[1:]
            yield event

    def GetModel(  # noqa: N802 the RPC's name
        self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetModelResponse:
        """See the contract."""
        del request, context
        return self._client.model()

    def GetServerStatus(  # noqa: N802 the RPC's name
        self, request: model_pb2.GetServerStatusRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetServerStatusResponse:
        """See the contract."""
        del request, context
        return self._client.status()


@contextmanager
def relayed(relay: Relay) -> Iterator[str]:
    """Serve a relay; its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(relay, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(relay, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def playground(address: str, http_address: str) -> Iterator[str]:
    """The command, as a person starts it; where its page is."""
    command = [sys.executable, "-m", "trimserve", "playground", "--address", address, "--page-port", "0"]
    command += ["--http-address", http_address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"playground on (\S+);", process.stdout.readline())
            if found is None:
                raise SystemExit(f"{' '.join(command)} did not open a page")
            yield found[1]
        finally:
            process.terminate()


def show(page: Page, picture: Path, question: str) -> None:
    """Upload a picture and type a question."""
    page.reload()
    page.set_input_files("#image input[type=file]", picture)
    expect(page.locator("#image img")).to_be_visible()
    page.fill("#question textarea", question)


def wait_for_account(page: Page, side: str) -> str:
    """The end of an answer; its tables' text."""
    account = page.locator(f"#{side}-account")
    expect(account).to_contain_text("in all")
    return str(account.inner_text())


def ask_both(page: Page) -> None:
    """Press the button of a page without answers, and wait for both."""
    page.click("#ask")
    for side in "AB":
        wait_for_account(page, side)


def check_streaming(page: Page, relay: Relay, expected: str) -> None:
    """The first letter is shown while nobody knows yet what follows."""
    relay.may_go_on.clear()
    page.click("#ask")
    expect(page.locator("#A-answer textarea")).to_have_value(expected[:1])
    assert "in all" not in page.locator("#A-account").inner_text()
    relay.may_go_on.set()
    for side in "AB":
        wait_for_account(page, side)


def check_side(page: Page, side: str, expected: pb.GenerateResponse) -> None:
    """The answer and the account of a side are the server's."""
    assert page.input_value(f"#{side}-answer textarea") == expected.text
    account = wait_for_account(page, side)
    [usage] = expected.usage.images
    fraction = (usage.kept_features + usage.merged_features) / usage.valid_features
    for told in (f"{fraction:.3f}", f"{expected.cross_kv_bytes.untrimmed:,}", f"{expected.cross_kv_bytes.held:,}"):
        assert told in account, (told, account)


def move_slider(page: Page, side: str, share: float) -> None:
    """Click the budget's slider, at a share of its length."""
    slider = page.locator(f"#{side}-side input[type=range]").first
    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": share * box["width"], "y": box["height"] / 2})


def copied(page: Page, kind: str) -> str:
    """What the box of a snippet holds; the editor shows lines one by one."""
    return "\n".join(page.locator(f"#A-{kind} .cm-line").all_inner_texts())


def check_snippets(page: Page, python: str, expected: str) -> None:
    """Copied from the page and run, both get the answer."""
    page.locator("#A-side button.label-wrap").click()
    expect(page.locator("#A-curl .cm-line").first).to_be_visible()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    options: dict[str, Any] = {"cwd": PICTURE.parent, "env": environment, "text": True, "check": True}
    said = subprocess.run([python, "-c", copied(page, "python")], stdout=subprocess.PIPE, **options).stdout
    assert said == f"{expected}\n", said
    events = subprocess.run(["bash", "-c", copied(page, "curl")], stdout=subprocess.PIPE, **options).stdout
    chunks = [json.loads(line) for line in re.findall(r"^data: (\{.*)$", events, re.MULTILINE)]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == expected, events


def verify(page: Page, client: Client, relay: Relay, python: str, out: Path) -> None:
    """All of it.

    Raises:
        AssertionError: something is not as it should be.
    """
    model = client.model()
    trimmed = Setting(model.policies[0], model.default_k_ratio, model.default_merge_ratio)
    question = Question(QUESTION, PICTURE.read_bytes(), 64, 0)
    expected = {
        side: client.generate(question.request(setting, model))
        for side, setting in (("A", trimmed), ("B", Setting(OFF, 1, 0)))
    }
    show(page, PICTURE, QUESTION)
    check_streaming(page, relay, expected["A"].text)
    show(page, PICTURE, QUESTION)
    ask_both(page)
    for side, answer in expected.items():
        check_side(page, side, answer)
    expect(page.locator("#A-kept img")).to_be_visible()
    expect(page.locator("#A-votes img")).to_be_visible()
    assert not page.locator("#B-votes img").count()
    page.screenshot(path=out, full_page=True)
    check_snippets(page, python, expected["A"].text)

    before, kept = wait_for_account(page, "A"), page.get_attribute("#A-kept img", "src")
    move_slider(page, "A", 0.7)
    page.wait_for_function("src => document.querySelector('#A-kept img')?.src !== src", arg=kept)
    assert wait_for_account(page, "A") != before
    check_side(page, "B", expected["B"])  # nobody asked it again

    show(page, OTHER_PICTURE, OTHER_QUESTION)
    ask_both(page)
    assert page.input_value("#B-answer textarea") not in ("", expected["B"].text)


def main() -> int:
    """Start a server, its playground and a browser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="Python that can run the server")
    parser.add_argument("--out", type=Path, default=OUT, help="the screenshot; default: %(default)s")
    arguments = parser.parse_args()
    python = str(arguments.python.absolute())  # as it is: what it links to would know no packages
    os.environ["PYTHONPATH"] = str(ROOT)
    asked: set[str] = set()
    with (
        server_process("--http-port", "0", python=python) as server,
        Client(server.address) as client,
        relayed(relay := Relay(client)) as address,
        playground(address, str(server.http_address)) as url,
        sync_playwright() as driver,
    ):
        # Its sandbox does not start where we are root.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.on("request", lambda request: asked.add(request.url))
        page.goto(url)
        verify(page, client, relay, python, arguments.out)
        browser.close()
    others = [each for each in asked if not each.startswith((url, "data:", "blob:"))]
    assert not others, others
    print(f"the playground answers in a browser, and its copied requests do; {arguments.out} shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
