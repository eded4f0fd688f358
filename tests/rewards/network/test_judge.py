"""The judge behind a server, against a server process that speaks the protocol and fails in every way."""

import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rewards.network import http
from rewards.network.judge import Judge
from rewards.network.templates import TEMPLATES, Template, numbers_of, probability_of_yes, read_answer, template_named
from rewards.registry import entry, load
from tests.support.judge_server import RATIONAL, judging

IMAGES = torch.arange(1, 9).view(8, 1, 1, 1).expand(8, 3, 4, 4) / 10
PROMPTS = list("abcdefgh")


@pytest.fixture
def url(judge_url):
    return judge_url


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the client waited, without waiting."""
    found = []
    monkeypatch.setattr("rewards.network.client.time.sleep", found.append)
    return found


def brightness(images):
    """What the server sees: 8 bits."""
    return (255 * images).round().mean((1, 2, 3)) / 255


# ---------------------------------------------------------------------------------------------- scores


def test_a_judge_gives_the_probability_of_yes(url):
    for given in (url, f"{url}/v1", f"{url}/"):
        scores = load("judge", url=given, model="m")(IMAGES, PROMPTS)
        torch.testing.assert_close(scores, brightness(IMAGES), rtol=0, atol=1e-5)


def test_a_judge_reads_the_number_of_its_template(url):
    scores = load("judge", url=url, model="m", template="unified-reward")(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, 1 + 4 * brightness(IMAGES), rtol=0, atol=1e-4)


def test_a_judge_reads_the_axes_of_rational_rewards(url):
    """Their mean on the scale from 1 to 4; no text is asked for, so that its axis does not count."""
    scores = load("judge", url=url, model="m", template="rational-rewards")(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, 1 + 3 * brightness(IMAGES), rtol=0, atol=1e-4)
    asked = Judge("http://host", "m", "rational-rewards").body(b"png", "a red {picture}")
    system, message = asked["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text"]
    assert message["content"][0]["text"].startswith("User Instruction: a red {picture}\n")
    assert system["role"] == "system" and asked["max_tokens"] == 4096 and "logprobs" not in asked


def test_axes_of_rational_rewards_are_read_each_under_its_heading():
    template = TEMPLATES["rational-rewards"]
    read = RATIONAL.format(score=2.5).replace("Score: N/A", "Score: **1.25**")
    assert numbers_of(read, template) == pytest.approx((2.5 + 2.5 + 1.25) / 3)
    first = read.replace("## Justification: No seams.\n", "").replace("2. Physical", "**2. Physical")
    assert numbers_of(first, template) == pytest.approx((2.5 + 2.5 + 1.25) / 3)
    for wrong in (read.replace("## Score: **1.25**\n", ""),  # the summary's is no axis's
                  read.replace("2. Physical and Visual Quality", "2. Beauty"),
                  read.replace("**1.25**", "9"), RATIONAL.format(score=2.5).replace("2.5000", "N/A")):  # fmt: skip
        with pytest.raises(ValueError, match="its answer has no score from 1 to 4"):
            numbers_of(wrong, template)


def test_a_template_of_a_file(tmp_path, url):
    file = tmp_path / "mine.json"
    about = {
        "question": "Rate {picture} of {prompt}",
        "patterns": [r"Final Score: (\S+)"],
        "range": [1, 5],
        "max_tokens": 9,
    }
    file.write_text(json.dumps(about))
    judge = Judge(url, "m", str(file))
    assert judge.asks == Template("Rate {picture} of {prompt}", (r"Final Score: (\S+)",), (1, 5), False, 9)
    torch.testing.assert_close(judge(IMAGES, PROMPTS), 1 + 4 * brightness(IMAGES), rtol=0, atol=1e-4)
    for wrong in ({**about, "patterns": ["Score"]}, {**about, "question": "Rate it"}, {**about, "more": 1}, [], {},
                  {**about, "range": [5]}, {**about, "patterns": ["("]}):  # fmt: skip
        file.write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError, match=r"mine.json is not a template \(.*\): write an object with some of question, "
        ):
            template_named(str(file))
    with pytest.raises(ValueError, match="none.json is not a template"):
        template_named("none.json")


def test_a_judge_has_the_range_of_its_template():
    asked = "judge[url=http://host, model=m{}]"
    for template, wanted in (("", (0, 1)), (", template=score", (1, 5)), (", template=rational-rewards", (1, 4)),
                             (", template=Is it {prompt}?", (0, 1))):  # fmt: skip
        assert entry(asked.format(template)).range == wanted
    with pytest.raises(ValueError, match="did you mean 'score'"):
        entry(asked.format(", template=scor"))


def test_probabilities_of_yes_and_no_are_summed_over_their_forms():
    told = [{"token": t, "logprob": p} for t, p in (("Yes", -0.2), ("No", -1.8), (" yes", -4.0), ("Maybe", -0.1))]
    assert probability_of_yes(told, of_all=False) == pytest.approx(0.8350878769, abs=1e-10)
    assert probability_of_yes(told, of_all=True) == pytest.approx(0.8370463920, abs=1e-10)


ANSWER = "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.5"


def test_numbers_of_an_answer_are_read_or_refused():
    template = TEMPLATES["unified-reward-2"]
    assert numbers_of(ANSWER, template) == pytest.approx((2.6947 + 3 + 4.5) / 3)
    assert numbers_of(f"Style Score: 1\n{ANSWER}", template) == pytest.approx((2.6947 + 3 + 4.5) / 3)  # the last
    for wrong in (ANSWER.replace("4.5", "45"), ANSWER.replace("Style", "Taste"), ""):
        with pytest.raises(ValueError, match="its answer has no score from 1 to 5"):
            numbers_of(wrong, template)


@pytest.mark.parametrize(
    ("said", "template", "score"),
    [
        ("4/5", "score", 4), ("4 / 5", "score", 4), ("4 out of 5", "score", 4), ("4 of 5.0", "score", 4),
        ("**4**/5", "score", 4), ("Score: 3.5", "score", 3.5), ("4, on a scale from 1 to 5", "score", 4),
        ("From 1 to 5: 2", "score", 2), ("On 1-5: 4", "score", 4), ("4.", "score", 4),
        ("Final Score: **4**", "unified-reward", 4), ("**Final Score:** 4/5", "unified-reward", 4),
        ("**Final Score**: 4.25", "unified-reward", 4.25), ("Final Score (1-5): 3", "unified-reward", 3),
        (ANSWER.replace("Alignment Score (1-5): 2.6947", "**Alignment Score (1-5)**: **3**"), "unified-reward-2", 3.5),
    ],
)  # fmt: skip
def test_a_number_is_read_beside_its_scale_and_in_bold(said, template, score):
    assert numbers_of(said, TEMPLATES[template]) == score


@pytest.mark.parametrize("said", ["-4", "6/5", "45", "", "none out of 5"])
def test_a_number_of_another_scale_is_refused(said):
    with pytest.raises(ValueError, match="its answer has no score from 1 to 5"):
        numbers_of(said, TEMPLATES["score"])


@pytest.mark.parametrize("answer", [None, [], {"choices": [None]}, {"choices": [{"logprobs": {"content": [{}]}}]}])
def test_an_answer_of_another_form_is_named(answer):
    with pytest.raises(ValueError, match=r"it answered without choices\[0\]\.logprobs"):
        read_answer(answer, TEMPLATES["yes"])
    with pytest.raises(ValueError, match=r"it answered without choices\[0\]\.message"):
        read_answer(answer, TEMPLATES["score"])


def test_the_request_is_what_the_protocol_wants(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    body = Judge("http://host", "some/model", extra=extra).body(b"png", 'a "red" {circle}')
    (message,) = body["messages"]
    picture, text = message["content"]
    assert picture == {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
    assert text == {"type": "text", "text": 'Does this picture show "a "red" {circle}"? Answer yes or no.'}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 1)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20) and body["chat_template_kwargs"] == extra[
        "chat_template_kwargs"
    ]
    assert "secret" not in json.dumps(body) + repr(Judge("http://host", "m"))


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("html", "Expecting value"),
        ("truncated", "Unterminated string|Expecting"),
        ("missing", r"it answered without choices\[0\]\.logprobs"),
        ("empty", "it answered without choices"),
        ("list", "it answered without choices"),
        ("undecided", "neither yes nor no is among the tokens"),
        ("unsure", "the log-probability that it tells of 'yes' is no number"),
        ("too large", "refused with 400: the picture is too large"),
        ("broken", "refused with 500"),
        ("teapot", "refused with 418"),
    ],
)
def test_a_picture_without_an_answer_has_no_score_and_says_why(prompt, why, url, slept):
    with pytest.warns(UserWarning, match=rf"1 of 8 pictures have no score: .*{why}"):
        scores = Judge(url, "m")(IMAGES, [*PROMPTS[:3], prompt, *PROMPTS[4:]])
    assert scores[3].isnan() and scores[3].numel() == 1
    rest = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(scores[rest], brightness(IMAGES)[rest], rtol=0, atol=1e-5)


def test_a_slow_answer_is_given_up(url):
    with pytest.warns(UserWarning, match="1 of 1 pictures have no score: .*timed out"):
        assert Judge(url, "m", timeout=0.3)(IMAGES[:1], ["slow"]).isnan()


def test_a_request_that_is_denied_is_an_error_that_loses_no_answer(url):
    judge = Judge(url, "m")
    with pytest.raises(ConnectionError, match=r"the judge .* refused with 400: the picture is too large"):
        judge(IMAGES[:1], ["too large"])
    with pytest.raises(ConnectionError, match=r"the judge .* refused with 404: no such model\\x1b\[31m"):
        judge(IMAGES, ["wrong model", *PROMPTS[1:]])
    assert sorted(judge.answered.values()) == pytest.approx(brightness(IMAGES)[1:].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "localhost:8000"}, "starts with http:// or https://, not 'localhost:8000'"),
        ({"template": "vqscore"}, r"no template 'vqscore' \(did you mean 'vqascore'\?\).* with {prompt} in it"),
        ({"concurrency": 0}, "concurrency is 0: give 1 or more"),
        ({"pause": -1.0}, "pause is -1.0 and retries 5: give 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Judge(**{"url": "http://host", "model": "m"} | options)


class Counting(BaseHTTPRequestHandler):
    """Counts requests and those that are open at once, and holds each until `most` are, or a minute has passed."""

    most, lock = 4, threading.Lock()
    posts = open = peak = 0
    full: threading.Event

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        counts = type(self)
        with self.lock:
            counts.posts, counts.open = counts.posts + 1, counts.open + 1
            counts.peak = max(counts.peak, counts.open)
            if counts.open == self.most:
                self.full.set()
        self.full.wait(60)
        self.full.set()
        body = json.dumps({"choices": [{"message": {"content": "3"}}]}).encode()
        with self.lock:  # before the client knows, which then sends its next
            counts.open -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_equal_pictures_are_asked_about_once_and_in_parallel():
    counts = type("Counts", (Counting,), {"full": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), counts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = Judge(f"http://127.0.0.1:{server.server_port}", "m", "score", concurrency=counts.most, timeout=120)
        twice = judge(torch.cat([IMAGES, IMAGES]), PROMPTS * 2)
        assert twice.tolist() == judge(IMAGES.flip(0), PROMPTS[::-1]).tolist() * 2 == [3.0] * 16
    finally:
        server.shutdown()
        server.server_close()
    assert (counts.posts, counts.peak) == (8, counts.most)


@pytest.fixture
def hasty(monkeypatch):
    """The time of an answer ends after 300 parts of it: a clock that no slow machine moves."""
    reads, left = Counter(), http.left

    def counted(end):
        reads[end] += 1
        if reads[end] > 300:
            raise TimeoutError("timed out")
        return left(end)

    monkeypatch.setattr(http, "left", counted)


PASSING = ("429 once", "500 once", "half once", "dropped once")
LASTING = ("html", "truncated", "missing", "undecided", "broken", "drips")


def test_of_two_hundred_pictures_all_are_scored_or_reported_in_order(url, slept, hasty):
    """16 at a time, of which a tenth fails: turned away, broken down, cut off, malformed or too slow."""
    images = torch.linspace(0.05, 0.95, 200).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    kinds = [*PASSING, *LASTING] * 2
    prompts = [f"prompt {i}: {kinds[i // 10] if i % 10 == 5 else 'a circle'}" for i in range(200)]
    lost = torch.tensor([any(kind in prompt for kind in LASTING) for prompt in prompts])
    with pytest.warns(UserWarning, match="12 of 200 pictures have no score: "):
        scores = Judge(url, "m", concurrency=16)(images, prompts)
    assert torch.equal(scores.isnan(), lost)
    torch.testing.assert_close(scores[~lost], brightness(images)[~lost], rtol=0, atol=1e-5)
    assert len(slept) == 2 * len(PASSING) + 2 * 5  # once each, and five times for what stays broken


def test_pauses_double_from_the_first_or_are_as_the_server_says(url, slept):
    with pytest.warns(UserWarning, match="refused with 500"):
        Judge(url, "m")(IMAGES[:1], ["broken"])
    with pytest.warns(UserWarning, match="refused with 500"):
        Judge(url, "m", retries=2, pause=0.25)(IMAGES[:1], ["broken"])
    wanted = [1, 2, 4, 8, 16, 0.25, 0.5, 7]
    assert Judge(url, "m")(IMAGES[:1], ["pauses: 429 once"]).isfinite().all()
    assert len(slept) == len(wanted) and all(a <= b <= 1.25 * a for a, b in zip(wanted, slept, strict=True))


def test_a_server_that_is_gone_leaves_no_score(slept):
    with judging() as (url, process):
        judge = Judge(url, "m", retries=2)
        assert judge(IMAGES[:2], PROMPTS[:2]).isfinite().all()
        process.kill()
        process.wait()
        with pytest.warns(UserWarning, match="2 of 2 pictures have no score: no scores from the judge .*refused"):
            assert judge(IMAGES[2:4], PROMPTS[2:4]).isnan().all()
    assert len(slept) == 4 and math.isclose(sum(slept), 6.0, rel_tol=0.3)
