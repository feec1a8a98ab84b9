"""Attention in rows that hold several examples."""

import torch


def test_attention_on_a_cpu_is_computed_in_float32_also_in_a_bfloat16_run(make_trainer, monkeypatch):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*states, **how):
        seen.extend(tensor.dtype for tensor in (*states, how["attn_mask"]))
        assert not torch.is_autocast_enabled("cpu")
        return attend(*states, **how)

    trainer = make_trainer("loss=sft", "precision=bfloat16")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    trainer.train_step(next(iter(trainer.train_batches)))
    assert set(seen) == {torch.float32}
