"""The example judges: the demo's, a chat model behind a local server, a tiny reward model."""

import itertools
import json

import pytest
import torch
from fake_server import serve
from tiny_classifiers import write_classifier

from dpo.data import film_reviews
from dpo.system.errors import UserError
from tools.endpoints import Endpoint
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


def ask(reply, question=QUESTION, key=None):
    """The answer of a judge whose model replies so, and its server."""
    with serve(lambda body: reply) as server:
        return ChatJudge(Endpoint("--url", server.url, key), "big")(question), server


@pytest.mark.parametrize(
    "reply, answer",
    [("A", "A"), ("**B**", "B"), ("A good answer has facts.\nThe better one: B.", "B"), ("Both. Tie", "tie")],
)
def test_the_last_word_of_a_chat_models_reply_is_its_answer(reply, answer):
    given, server = ask(reply, key="secret")
    assert given == answer
    (body,) = server.asked
    assert (server.paths, server.keys) == ({"/v1/chat/completions"}, {"Bearer secret"})
    assert (body["model"], body["temperature"]) == ("big", 0)
    (message,) = body["messages"]
    assert all(text in message["content"] for text in QUESTION.values())


def test_a_reply_without_an_answer_is_reported_and_counts_as_a_tie(capsys):
    answer, server = ask("I cannot tell a thing")
    assert answer == "tie"
    assert "which counts as a tie: 'I cannot tell a thing'" in capsys.readouterr().err
    assert server.keys == {None}


def test_a_prompt_of_messages_is_written_with_its_roles():
    _, server = ask("A", QUESTION | {"prompt": [{"role": "system", "content": "Be short."}]})
    assert "system: Be short." in server.asked[0]["messages"][0]["content"]


def test_answers_keep_the_order_of_the_questions():
    lines = [json.dumps(QUESTION | {"a": str(n)}) for n in range(20)]
    assert list(answer_all(lambda question: question["a"], lines, 8)) == [str(n) for n in range(20)]


# A reward model


def test_a_reward_model_prefers_the_text_with_the_higher_score(tmp_path):
    model, tokenizer = write_classifier(tmp_path)
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
    model, tokenizer = write_classifier(tmp_path, template=template)
    judge = reward_judge(str(tmp_path), "cpu")

    def score(answer):
        ids = tokenizer(f"user: Hi\nassistant: {answer}\n", add_special_tokens=False)["input_ids"]
        return model(torch.tensor([ids])).logits.item()

    answers = ["Hello.", "Go.", "Yes", "A long answer.", "1", "The Danube", "?", "Good day to you!"]
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        for a, b in itertools.combinations(answers, 2):
            assert judge({"prompt": prompt, "a": a, "b": b}) == ("A" if score(a) > score(b) else "B")


def test_a_model_that_gives_several_scores_is_refused(tmp_path):
    write_classifier(tmp_path, num_labels=3)
    with pytest.raises(UserError, match="gives 3 scores per text; a reward model gives one"):
        reward_judge(str(tmp_path), "cpu")


def test_messages_need_a_chat_template(tmp_path):
    write_classifier(tmp_path)
    with pytest.raises(UserError, match="has no chat template for prompts that are messages"):
        reward_judge(str(tmp_path), "cpu")({"prompt": [{"role": "user", "content": "Hi"}], "a": "x", "b": "y"})
