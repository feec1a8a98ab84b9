"""Options that several losses share, against numbers derived by hand, and what a batch's sums are made of."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_loss
from tiny_models import make_examples, mask_responses, respond

from dpo.model.logps import Logps
from dpo.training.objectives import Context, LengthOptions, desensitized_sums, mismatch, wpo_weights
from losses import LOSSES

B = math.log(2)


def tensor(*values):
    """Make a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def compute(loss, policy, reference, lengths=((2, 2), (3, 4))):
    """A loss's losses and its gradient, (batch, 2), for sums of log-probabilities (batch, 2)."""
    sums, sizes = tensor(*policy).requires_grad_(), torch.tensor(lengths)
    examples = [SimpleNamespace(text=SimpleNamespace(scores=(3.0, 1.0)))] * len(policy)
    losses, metrics = loss(Logps(sums, sizes), Logps(tensor(*reference), sizes), Context(examples))
    losses.sum().backward()
    assert metrics["loss"].tolist() == losses.tolist()
    return losses.tolist(), sums.grad.tolist()


# As in test_losses.py: log-ratios a_w = 1, -1 and a_l = -1, 2, lengths (2, 2) and (3, 4)
POLICY, REFERENCE = ([-4.0, -8.0], [-6.0, -4.0]), ([-5.0, -7.0], [-5.0, -6.0])
LENGTH = [name for name, loss in LOSSES.items() if issubclass(loss, LengthOptions)]


def test_nll_weight_adds_the_chosen_likelihood_per_token():
    """-log pi(y_w) per token is 4/2 and 6/3; with weight 3 the loss gains 6, its gradient -3/2 and -3/3."""
    plain, slopes = compute(make_loss("dpo"), POLICY, REFERENCE)
    losses, gradient = compute(make_loss("dpo", nll_weight=3.0), POLICY, REFERENCE)
    assert losses == pytest.approx([value + 6 for value in plain], rel=1e-12)
    assert gradient[0] == pytest.approx([slopes[0][0] - 3 / 2, slopes[0][1]], rel=1e-12)
    assert gradient[1] == pytest.approx([slopes[1][0] - 3 / 3, slopes[1][1]], rel=1e-12)


def test_length_normalize_divides_by_the_number_of_tokens():
    """Log-ratios per token 1/2, -1/2 and -1/3, 1/2: h = 1 and -5/6. With beta = B the first is -log(2/3)."""
    losses, gradient = compute(make_loss("dpo", beta=B, length_normalize=True), POLICY, REFERENCE)
    assert losses == pytest.approx([math.log(3 / 2), math.log1p(2 ** (5 / 6))], rel=1e-12)
    assert gradient[0] == pytest.approx([-B / 3 / 2, B / 3 / 2], rel=1e-12)
    wrong = B / (1 + 2 ** (-5 / 6))
    assert gradient[1] == pytest.approx([-wrong / 3, wrong / 4], rel=1e-12)


@pytest.mark.parametrize("name", LENGTH)
def test_length_normalize_changes_nothing_for_responses_of_one_token(name):
    arguments = POLICY, REFERENCE, ((1, 1), (1, 1))
    assert compute(make_loss(name, length_normalize=True), *arguments) == compute(make_loss(name), *arguments)


def test_ld_alpha_weights_tokens_beyond_the_shorter_response():
    """Pair 1, lengths 3 and 1: -1 - 1/4 (2 + 4) = -2.5 and -8. Pair 2, lengths 2 and 3: -16 - 32 and -3 - 5 - 7/4."""
    tokens, lengths = tensor(-1, -2, -4, -8, -16, -32, -3, -5, -7), torch.tensor([[3, 1], [2, 3]])
    sums = desensitized_sums(Logps.from_tokens(tokens, lengths), 0.25)
    assert sums.tolist() == [[-2.5, -8.0], [-48.0, -9.75]]


def test_ld_alpha_acts_on_policy_and_reference_and_has_its_gradient():
    """Lengths 2 and 1, beta = B, alpha = 1/2. Policy -1 - 4/2 = -3, -8; reference -2 - 2/2 = -3, -6: h = 2, s = 4/5.

    The gradient -B/5 of the chosen response reaches its second token by half.
    """
    tokens, lengths = tensor(-1, -4, -8).requires_grad_(), torch.tensor([[2, 1]])
    loss = make_loss("dpo", beta=B, ld_alpha=0.5)
    reference = Logps.from_tokens(tensor(-2, -2, -6), lengths)
    losses, metrics = loss(Logps.from_tokens(tokens, lengths), reference, Context())
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(5 / 4), rel=1e-12)
    assert tokens.grad.tolist() == pytest.approx([-B / 5, -B / 10, B / 5], rel=1e-12)
    assert metrics["logps/chosen"].item() == -3.0


def test_wpo_weights_a_pair_by_its_likelihood_among_samples():
    """Log of pi / sum pi^2: -1, -3 of y_w, mean -2; 1, 0 of y_l, mean 1/2: e^-1.5. Pair 2: e^1, which counts as 1."""
    lengths = torch.tensor([[2, 2], [1, 1]])
    tokens, collisions = tensor(-2, -4, -1, -2, -1, -1).requires_grad_(), tensor(-1, -1, -2, -2, -1.5, -1.5)
    logps = Logps.from_tokens(tokens, lengths)
    policy = Logps(logps.sums, lengths, tokens, collisions)
    weights = wpo_weights(policy)
    assert weights.tolist() == pytest.approx([math.exp(-1.5), 1.0], rel=1e-12) and not weights.requires_grad
    plain = make_loss("dpo")(policy, Logps(tensor([-5, -7], [-5, -6]), lengths), Context())[0]
    loss = make_loss("dpo", token_weights="wpo", nll_weight=1.0)
    losses = loss(policy, Logps(tensor([-5, -7], [-5, -6]), lengths), Context())[0]
    assert loss.needs_collisions and not make_loss("dpo").needs_collisions
    assert losses.tolist() == pytest.approx((plain * weights - policy.means[:, 0]).tolist(), rel=1e-12)


# f-DPO: u = 2 and 1/2 in pair 1, 1/2 and 4 in pair 2


def divergence_losses(name, **settings):
    """The losses and gradients of pairs whose ratios u are 2, 1/2 and 1/2, 4; beta is B."""
    policy = ([-5 + B, -7 - B], [-5 - B, -6 + 2 * B])
    return compute(make_loss("dpo", beta=B, divergence=name, **settings), policy, REFERENCE)


@pytest.mark.parametrize(
    "name, slopes, derivatives",
    [
        # f'(u) = log u; u f''(u) = 1
        ("reverse_kl", ((B, -B), (-B, 2 * B)), ((1, 1), (1, 1))),
        # -1 / u; 1 / u
        ("forward_kl", ((-1 / 2, -2), (-2, -1 / 4)), ((1 / 2, 2), (2, 1 / 4))),
        # log(2u / (1 + u)); 1 / (1 + u)
        (
            "js",
            ((math.log(4 / 3), math.log(2 / 3)), (math.log(2 / 3), math.log(8 / 5))),
            ((1 / 3, 2 / 3), (2 / 3, 1 / 5)),
        ),
        # a = 1/2: 2 (1 - 1 / sqrt u); 1 / sqrt u
        (
            "alpha",
            ((2 - math.sqrt(2), 2 - 2 * math.sqrt(2)), (2 - 2 * math.sqrt(2), 1)),
            ((math.sqrt(1 / 2), math.sqrt(2)), (math.sqrt(2), 1 / 2)),
        ),
    ],
)
def test_each_divergence_has_the_slopes_of_its_f(name, slopes, derivatives):
    """h = f'(u_w) - f'(u_l), the loss log(1 + 2^-h), its gradient -B sigmoid(-B h) times u f''(u), and + for y_l."""
    losses, gradient = divergence_losses(name)
    for i, ((w, l), (dw, dl)) in enumerate(zip(slopes, derivatives, strict=True)):  # noqa: E741
        wrong = 1 / (1 + 2 ** (w - l))
        assert losses[i] == pytest.approx(math.log1p(2 ** (l - w)), rel=1e-12)
        assert gradient[i] == pytest.approx([-B * wrong * dw, B * wrong * dl], rel=1e-12)


def test_alpha_divergence_goes_from_reverse_to_forward_kl():
    near = [divergence_losses("alpha", divergence_alpha=a)[0] for a in (1e-6, 1 - 1e-6)]
    far = [divergence_losses(name)[0] for name in ("reverse_kl", "forward_kl")]
    assert near[0] == pytest.approx(far[0], rel=1e-5) and near[1] == pytest.approx(far[1], rel=1e-5)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_every_divergence_starts_at_log_2(name):
    losses = compute(make_loss("robust", divergence=name, label_smoothing=0.2), REFERENCE, REFERENCE)[0]
    assert losses == pytest.approx([B, B], rel=1e-12)


# Sums over a batch


def test_a_loss_needs_no_sums_and_no_state_unless_it_says_so():
    loss = make_loss("dpo")
    assert loss.batch_sums(iter(()), None) == {} and loss.next_state({"kept": 1.0}, {}) == {"kept": 1.0}


def test_mismatched_examples_take_the_next_examples_responses_and_never_grow():
    """The longest example has 13 + 6 tokens, so after its prompt 6 are left."""
    examples = make_examples([(9, 5, 3), (13, 1, 6), (4, 2, 8)])
    first, second, third = mismatch(examples)
    assert first.prompt == examples[0].prompt and first.responses == examples[1].responses
    assert [len(response) for response in second.responses] == [2, 6]
    assert second.responses[1] == examples[2].responses[1][:6]
    assert third.responses == examples[0].responses
    assert mismatch([respond([1], [2])])[0].responses == ([2],)


def test_masks_are_cut_with_mismatched_responses_and_leave_none_without_a_trained_token():
    """After the prompts of 1 and of 3 tokens, 4 and 2 are left: there the mask 0 0 1 would have no trained token."""
    short, long = mask_responses(respond([1], [2, 3]), [1, 0]), mask_responses(respond([4, 5, 6], [7, 8]), [0, 1])
    context_first = mask_responses(respond([9], [2, 3, 7]), [0, 0, 1])
    assert [one.loss_masks for one in mismatch([short, long])] == [([False, True],), ([True, False],)]
    cut = mismatch([long, context_first])[0]
    assert cut.responses == ([2, 3],) and cut.loss_masks == ([True, True],)
    assert mismatch([respond([1], [2, 3]), long])[1].loss_masks == ()


def test_mismatched_examples_take_no_response_to_their_own_prompt_unless_there_is_no_other():
    """Prompts p, p, q: the first two take q's response 5, q the first p's 3."""
    examples = [respond([1], [3]), respond([1], [4]), respond([2], [5])]
    assert [example.responses for example in mismatch(examples)] == [([5],), ([5],), ([3],)]
    assert [example.responses for example in mismatch(examples[:2])] == [([4],), ([3],)]


@pytest.mark.filterwarnings("ignore:Field name")  # pydantic warns of the same
@pytest.mark.parametrize("name", ["metrics", "pair_losses", "needs_scores", "needs_reference", "copy"])
def test_a_field_with_the_name_of_a_method_is_refused_where_the_loss_is_defined(name):
    with pytest.raises(TypeError, match=rf"^New.{name}: losses have a method or .*; rename the field, and its key in"):
        type("New", (LOSSES["hinge"],), {"__annotations__": {name: float}, "__module__": __name__})


def test_a_loss_may_have_a_field_named_margin():
    class New(LOSSES["hinge"]):
        margin: float

        def pair_losses(self, h):
            return (self.margin - self.beta * h).relu()

    loss = New(**make_loss("hinge").model_dump(), margin=3.0)
    losses, _ = compute(loss, POLICY, REFERENCE)
    assert losses == pytest.approx([2.8, 3.3])
