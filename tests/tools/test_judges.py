"""The example judges: the demo's, a chat model behind a local server, a tiny reward model."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from dpo.data import film_reviews
from dpo.system.errors import UserError
from tools import judges
from tools.judges import ChatJudge, answer_all, demo_judge, reward_judge

QUESTION = {"prompt": "Name a river.", "a": " The Danube.", "b": " Why?"}


def test_the_demos_judge_ranks_warm_above_cold_above_broken():
    warm, cold = (film_reviews.make_rows("test")[0][side] for side in ("chosen", "rejected"))
    texts = {"warm": warm, "cold": cold, "broken": "film film"}
    answers = {(a, b): demo_judge({"prompt": "", "a": texts[a], "b": texts[b]}) for a in texts for b in texts}
    assert [answers[pair] for pair in (("warm", "cold"), ("cold", "broken"), ("warm", "broken"))] == ["A"] * 3
    assert [answers[pair] for pair in (("cold", "warm"), ("broken", "cold"))] == ["B"] * 2
    assert {answers[kind, kind] for kind in texts} == {"tie"}


# A chat model


@pytest.fixture
def server():
    """Serve replies on a local port; one that is a number is the status of a failure. Keeps what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            reply = self.server.replies.pop(0)
            self.send_response(reply if isinstance(reply, int) else 200)
            if reply == "cut":
                self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked, http.replies = [], []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        http.url = f"http://127.0.0.1:{http.server_port}/v1"
        yield http
        http.shutdown()


@pytest.mark.parametrize(
    "reply, answer",
    [("A", "A"), ("**B**", "B"), ("A good answer has facts.\nThe better one: B.", "B"), ("Both. Tie", "tie")],
)
def test_the_last_word_of_a_chat_models_reply_is_its_answer(reply, answer, server):
    server.replies = [reply]
    assert ChatJudge(server.url, "big", "secret")(QUESTION).lower() == answer.lower()
    path, key, body = server.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "big", 0)
    (message,) = body["messages"]
    assert all(text in message["content"] for text in QUESTION.values())


def test_a_reply_without_an_answer_is_reported_and_counts_as_a_tie(server, capsys):
    server.replies = ["I cannot tell a thing"]
    assert ChatJudge(server.url, "big")(QUESTION) == "tie"
    assert "which counts as a tie: 'I cannot tell a thing'" in capsys.readouterr().err
    assert server.asked[0][1] is None


def test_a_prompt_of_messages_is_written_with_its_roles(server):
    server.replies = ["A"]
    ChatJudge(server.url, "big")(QUESTION | {"prompt": [{"role": "system", "content": "Be short."}]})
    assert "system: Be short." in server.asked[0][2]["messages"][0]["content"]


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(server):
    judge = ChatJudge(server.url, "big", pause=0)
    server.replies = [503, 429, "B"]
    assert judge(QUESTION) == "B" and len(server.asked) == 3
    server.replies = [401, "B"]
    with pytest.raises(UserError, match="401"):
        judge(QUESTION)
    server.replies = [500] * judges.ATTEMPTS
    with pytest.raises(UserError, match=f"--url {server.url}: HTTP Error 500"):
        judge(QUESTION)
    assert server.replies == []


def test_a_reply_that_breaks_off_is_asked_for_again(server):
    server.replies = ["cut", "B"]
    assert ChatJudge(server.url, "big", pause=0)(QUESTION) == "B" and len(server.asked) == 2
    server.replies = ["cut"] * judges.ATTEMPTS
    with pytest.raises(UserError, match=f"--url {server.url}: IncompleteRead"):
        ChatJudge(server.url, "big", pause=0)(QUESTION)


def test_answers_keep_the_order_of_the_questions(server):
    lines = [json.dumps(QUESTION | {"a": str(n)}) for n in range(20)]
    assert list(answer_all(lambda question: question["a"], lines, 8)) == [str(n) for n in range(20)]


# A reward model


def write_reward_model(folder, num_labels=1, template=None):
    """Write a random reward model of two layers."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = tiny_config("llama", len(tokenizer))
    config.num_labels, config.pad_token_id = num_labels, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def test_a_reward_model_prefers_the_text_with_the_higher_score(tmp_path):
    model, tokenizer = write_reward_model(tmp_path)
    judge = reward_judge(str(tmp_path), "cpu")
    texts = [" The Danube.", " Why?", " No.", " It is the Rhine."]
    scores = {}
    for text in texts:
        ids = torch.tensor([tokenizer("Name a river." + text)["input_ids"]])
        scores[text] = model(ids).logits.item()
    assert len(set(scores.values())) == 4
    for a in texts:
        for b in texts:
            expected = "tie" if a == b else "A" if scores[a] > scores[b] else "B"
            assert judge({"prompt": "Name a river.", "a": a, "b": b}) == expected


def test_a_reward_model_with_a_chat_template_reads_turns(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model, tokenizer = write_reward_model(tmp_path, template=template)
    judge = reward_judge(str(tmp_path), "cpu")

    def score(answer):
        ids = tokenizer(f"user: Hi\nassistant: {answer}\n", add_special_tokens=False)["input_ids"]
        return model(torch.tensor([ids])).logits.item()

    answers = ["Hello.", "Go.", "Yes", "A long answer.", "1", "The Danube", "?", "Good day to you!"]
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        for a, b in itertools.combinations(answers, 2):
            assert judge({"prompt": prompt, "a": a, "b": b}) == ("A" if score(a) > score(b) else "B")


def test_a_model_that_gives_several_scores_is_refused(tmp_path):
    write_reward_model(tmp_path, num_labels=3)
    with pytest.raises(UserError, match="gives 3 scores per text; a reward model gives one"):
        reward_judge(str(tmp_path), "cpu")


def test_messages_need_a_chat_template(tmp_path):
    write_reward_model(tmp_path)
    with pytest.raises(UserError, match="has no chat template for prompts that are messages"):
        reward_judge(str(tmp_path), "cpu")({"prompt": [{"role": "user", "content": "Hi"}], "a": "x", "b": "y"})
