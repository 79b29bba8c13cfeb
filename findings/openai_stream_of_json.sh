#!/bin/sh
# openai 3.57.0: a stream that the server answers with a whole completion, as JSON, is an empty stream without an error.
#
# Behaviour seen (Linux, Python 3.11):
#   without stream=True: hello
#   with stream=True: 0 chunks, no exception
# A server that does not know `stream`, or a proxy that buffers, so looks like a model that said nothing. A server has
# to answer with `text/event-stream`, and a client has to count its chunks. Exits 0 while that is so, 1 once it changes.
#
# Usage: sh findings/openai_stream_of_json.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cat > "$folder/ask.py" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from openai import OpenAI

MESSAGE = {"role": "assistant", "content": "hello"}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "any",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
}


class WholeAnswers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


server = HTTPServer(("127.0.0.1", 0), WholeAnswers)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
asked = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
whole = client.chat.completions.create(**asked).choices[0].message.content
print("without stream=True:", whole)
try:
    chunks = sum(1 for _ in client.chat.completions.create(**asked, stream=True))
except Exception as error:
    sys.exit(f"changed: {type(error).__name__}: {error}")
print(f"with stream=True: {chunks} chunks, no exception")
sys.exit(0 if (whole, chunks) == ("hello", 0) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/ask.py"
