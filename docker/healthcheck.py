"""Exit status 0 when the server of this container takes requests; the image's HEALTHCHECK."""

import os
import sys
from urllib.request import ProxyHandler, build_opener

port = os.environ["TRIMSERVE__SERVER__METRICS_PORT"]
# Without the proxy of the environment: it cannot reach our loopback.
opener = build_opener(ProxyHandler({}))
try:
    opener.open(f"http://127.0.0.1:{port}/readyz", timeout=4)
except OSError as error:
    sys.exit(str(error))
