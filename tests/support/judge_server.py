"""A server of OpenAI's chat completions that judges a picture by its brightness, and fails as the prompt says.

python judge_server.py [SHARE]     prints its port; SHARE of the requests, drawn by their number, is told 429 first
"""

import base64
import io
import json
import math
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from PIL import Image

BAD = {  # what a prompt asks for: status, body
    "html": (200, "<html>not a completion</html>"),
    "truncated": (200, '{"choices": [{"mess'),
    "missing": (200, '{"choices": [{"message": {"content": "yes"}, "logprobs": null}]}'),
    "empty": (200, '{"choices": []}'),
    "list": (200, "[1, 2]"),
    "undecided": (200, '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "I", "logprob": 0}]}]}}]}'),
    "broken": (500, "{}"),
    "wrong model": (404, '{"error": "no such model\\u001b[31m"}'),
}
LOCK = threading.Lock()


class Judges(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            turned_away = DRAW.random() < SHARE
        self.judge(asked, turned_away)

    def judge(self, asked, turned_away):
        picture, text = (part for part in asked["messages"][0]["content"])
        prompt = text["text"]
        if turned_away:
            return self.send(429, "{}", {"Retry-After": "0"})
        for word, (status, body) in BAD.items():
            if word in prompt:
                return self.send(status, body)
        if "slow" in prompt:
            time.sleep(30)
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        pixels = Image.open(io.BytesIO(data)).convert("L").tobytes()
        bright = min(max(sum(pixels) / len(pixels) / 255, 0.01), 0.99)
        tokens = [{"token": "Yes", "logprob": math.log(bright)}, {"token": " no", "logprob": math.log(1 - bright)}]
        written = f"I thought of 1 first.\nFinal Score: {1 + 4 * bright:.4f}"
        choice = {"message": {"content": written}, "logprobs": {"content": [{"top_logprobs": tokens}]}}
        time.sleep(0.01)
        return self.send(200, json.dumps({"choices": [choice], "model": asked["model"]}))

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@contextmanager
def judging(share=0.0):
    """The URL of such a server in a process of its own, and the process, which is gone afterwards."""
    command = [sys.executable, __file__, str(share)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", process
        finally:
            process.kill()


if __name__ == "__main__":
    SHARE, DRAW = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0, Random(0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judges)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
