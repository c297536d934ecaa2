"""`trimserve playground`: a page to try trimming on."""

import threading
from importlib.util import find_spec
from typing import Annotated

import typer

from trimserve.commands.server import OWN_SERVER, asked_server
from trimserve.config import Config, ServerConfig
from trimserve.connection import Connection, with_connection
from trimserve.knobs import with_knobs

__all__ = ["playground"]

_PORT = 7860
_HTTP_PORT = 8000
"""That docs/http.md opens."""


@with_knobs("model")
@with_connection(OWN_SERVER)
def playground(
    page_host: Annotated[
        str, typer.Option(help="Where the page listens. Whoever reaches it asks the server with your token.")
    ] = "127.0.0.1",
    page_port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = _PORT,
    http_address: Annotated[
        str | None,
        typer.Option(help=f"HOST:PORT of the server's HTTP, for the curl line; default: its host, {_HTTP_PORT}."),
    ] = None,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Open a page that asks about an image under two settings, and shows what each keeps and costs."""
    if find_spec("gradio") is None:
        raise typer.BadParameter("needs Gradio: pip install 'trimserve[playground]'")

    from trimserve.playground.page import Server, opened

    address = connection.address or f"{ServerConfig().host}:{ServerConfig().port}"
    told = Connection(address, connection.tls, connection.token)
    http_address = http_address or f"{address.rpartition(':')[0]}:{_HTTP_PORT}"
    with asked_server(connection, config) as client:
        page = opened(Server(client, client.model(), told, http_address), page_host, page_port)
        print(f"playground on {page.local_url}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
