"""The demo's data and its judge."""

import re

from dpo.data import film_reviews


def test_the_demo_data_set_has_new_films_in_its_test_split_and_half_of_its_targets_are_warm():
    train_rows, test_rows = film_reviews.make_rows("train"), film_reviews.make_rows("test")
    assert (len(train_rows), len(test_rows)) == (2000, 200)
    prompts = [row["prompt"] for row in train_rows + test_rows]
    assert len(set(prompts)) == 2200
    assert sum(row["sft_target"] == row["chosen"] for row in train_rows) == 1000
    assert film_reviews.make_rows("train") == train_rows


def test_the_judge_knows_every_review_of_the_demo_and_no_other_text():
    for row in film_reviews.make_rows("test"):
        assert (film_reviews.judge(row["chosen"]), film_reviews.judge(row["rejected"])) == ("warm", "cold")
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
        assert film_reviews.judge(chosen[:-1]) == "broken"  # the last sentence is not whole
        assert film_reviews.judge(re.split(r"(?<=[.!]) ", chosen)[0]) == "broken"  # a verdict alone
        assert film_reviews.judge(f"{chosen} {rejected}") == "broken"  # both verdicts
    for text in ("", "I like it.", "a a a a", "The the film is fine. It is good.", "They have film film film!"):
        assert film_reviews.judge(text) == "broken"
