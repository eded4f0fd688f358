"""A server of OpenAI's chat completions that judges a picture by its brightness, and fails as the prompt says.

python judge_server.py     prints its port
"""

import base64
import io
import json
import math
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

BAD = {  # what a prompt asks for: status, body
    "html": (200, "<html>not a completion</html>"),
    "truncated": (200, '{"choices": [{"mess'),
    "missing": (200, '{"choices": [{"message": {"content": "yes"}, "logprobs": null}]}'),
    "empty": (200, '{"choices": []}'),
    "list": (200, "[1, 2]"),
    "undecided": (200, '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "I", "logprob": 0}]}]}}]}'),
    "broken": (500, "{}"),
    "teapot": (418, "{}"),
    "unsure": (200, '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": NaN}]}]}}]}'),
    "too large": (400, '{"error": "the picture is too large"}'),
    "wrong model": (404, '{"error": "no such model\\u001b[31m"}'),
}
ONCE = {  # what a prompt asks for before its first answer: status, headers; none: no answer at all
    "429 once": (429, {"Retry-After": "7"}),
    "500 once": (500, {}),
    "half once": (200, {"Content-Length": "500"}),
    "dropped once": None,
}
SEEN, LOCK = set(), threading.Lock()  # prompts that have failed already
RATIONAL = """# User Request Analysis
Text Faithfulness may need a "Score: 4".
# Detailed Judgement
1. Text Faithfulness:
## Justification: Score it by what is there.
## Score: {score:.4f}
2. Physical and Visual Quality:
## Justification: No seams.
## Score: {score:.4f} / 4
3. Text Rendering:
## Justification: none is asked for.
## Score: N/A
# Summary: good. Score: 9.9
"""


class Judges(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (content,) = (message["content"] for message in asked["messages"] if message["role"] == "user")
        prompt, *rest = (part["text"] for part in content if part["type"] == "text")
        (picture,) = (part["image_url"]["url"] for part in content if part["type"] == "image_url")
        with LOCK:
            fails = next((word for word in ONCE if word in prompt and prompt not in SEEN), None)
            SEEN.add(prompt)
        if fails is None:
            self.judge(asked, prompt, picture, " ".join(rest))
        elif ONCE[fails] is not None:
            self.send(ONCE[fails][0], "{}", ONCE[fails][1])

    def judge(self, asked, prompt, picture, rest):
        for word, (status, body) in BAD.items():
            if word in prompt:
                return self.send(status, body)
        if "slow" in prompt:
            time.sleep(30)
        if "drips" in prompt:
            return self.drip()
        data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
        pixels = Image.open(io.BytesIO(data)).convert("L").tobytes()
        bright = min(max(sum(pixels) / len(pixels) / 255, 0.01), 0.99)
        tokens = [{"token": "Yes", "logprob": math.log(bright)}, {"token": " no", "logprob": math.log(1 - bright)}]
        written = f"I thought of 1 first.\nFinal Score: {1 + 4 * bright:.4f}"
        if "# Detailed Judgement" in rest:
            written = RATIONAL.format(score=1 + 3 * bright)
        choice = {"message": {"content": written}, "logprobs": {"content": [{"top_logprobs": tokens}]}}
        time.sleep(0.01)
        return self.send(200, json.dumps({"choices": [choice], "model": asked["model"]}))

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def drip(self):
        """A byte at a time, until the client has gone."""
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.001)

    def log_message(self, *_):
        pass


@contextmanager
def judging():
    """The URL of such a server in a process of its own, and the process, which is gone afterwards."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", process
        finally:
            process.kill()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Judges)
    print(server.server_address[1], flush=True)
    server.serve_forever()
