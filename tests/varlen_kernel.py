"""A CPU's kernel for the operator of torch.nn.attention.varlen, which torch has for GPUs alone: dense, in float32."""

import torch
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward

calls: list[tuple[int, int]] = []  # the longest segments of queries and of keys, as each call of the kernel gives them


def weights_of(q, k, scale):
    """The attention weights (heads, queries, keys), causal from the end, as the kernel's documentation says."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def segments_of(query, key, query_starts, key_starts, *others):
    """Yield queries, keys, values and what else lies like queries of each segment, keys once for each head."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    group = query.shape[1] // key.shape[1]
    for i in range(len(query_starts) - 1):
        rows, columns = slice(*query_starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
        like_keys = [states[columns].float().repeat_interleave(group, 1) for states in (key, others[0])]
        yield query[rows].float(), *like_keys, *[states[rows].float() for states in others[1:]]


@_varlen_attn.register_kernel("cpu")
def forward(query, key, value, query_starts, key_starts, max_q, max_k, is_causal=False, scale=None, *others):
    calls.append((int(max_q), int(max_k)))
    assert is_causal and max_q >= query_starts.diff().max() and max_k >= key_starts.diff().max()
    scale = query.shape[2] ** -0.5 if scale is None else scale
    segments = segments_of(query, key, query_starts, key_starts, value)
    out = torch.cat([torch.einsum("hqk,khd->qhd", weights_of(q, k, scale), v) for q, k, v in segments])
    log_sums = query.new_empty(query.shape[1], len(query), dtype=torch.float)  # not needed here
    return out.to(query.dtype), log_sums, torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def backward(grad, query, key, value, out, log_sums, query_starts, key_starts, max_q, max_k, causal, state, scale, *_):
    scale = query.shape[2] ** -0.5 if scale is None else scale
    found = []
    for q, k, v, g in segments_of(query, key, query_starts, key_starts, value, grad):
        weights = weights_of(q, k, scale)
        of_weights = torch.einsum("qhd,khd->hqk", g, v)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, q), torch.einsum("hqk,qhd->khd", weights, g)
        of_keys = [states.view(len(k), key.shape[1], -1, key.shape[2]).sum(2) for states in of_keys]
        found.append((torch.einsum("hqk,khd->qhd", of_scores, k), *of_keys))
    return tuple(torch.cat(parts).to(query.dtype) for parts in zip(*found, strict=True))
