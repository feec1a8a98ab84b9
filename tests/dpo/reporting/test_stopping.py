"""Which evaluation is the best, which one ends a run, and what is said of both beforehand."""

import math

import pytest
from conftest import validated

from dpo.reporting.stopping import (
    CONDITIONS,
    STOPPED,
    Cause,
    Criterion,
    Judge,
    Progress,
    Stop,
    keep_best_problems,
    resumed_notes,
    stop_if_notes,
)
from dpo.settings.run_config import MAY_CHANGE
from dpo.settings.schema import StopIfSettings
from dpo.system.errors import RunError, UserError

DPO = ("loss=dpo", "model=tiny")
START = {
    "loss/eval": 0.5,
    "diagnosis/entropy_per_token": 2.0,
    "diagnosis/kl_per_token": 0.0,
    "diagnosis/finished": 0.75,
    "diagnosis/chosen_log_ratio_per_token": 0.0,
}


def judged(values, *overrides, start=True):
    """Judge evaluations with these values of loss/eval, one after each update of 8 examples."""
    judge, progress, stop = Judge(validated(*DPO, *overrides)[0]), Progress(), None
    if start:
        progress, stop = judge(progress, 0, 0, START)
    for update, value in enumerate(values, start=1):
        assert stop is None
        progress, stop = judge(progress, 8 * update, update, START | {"loss/eval": value})
    return progress, stop


@pytest.mark.parametrize(
    "text, name, sign",
    [
        ("loss/eval", "loss/eval", -1),
        ("rewards_eval/accuracies", "rewards_eval/accuracies", 1),
        ("diagnosis/kl", "diagnosis/kl", -1),
        ("max:loss/eval", "loss/eval", 1),
        ("min:anything", "anything", -1),
    ],
)
def test_the_direction_of_a_metric_is_known_or_written(text, name, sign):
    assert Criterion.parse(text) == Criterion(name, sign)


@pytest.mark.parametrize(
    "text, hint",
    [
        ("diagnosis/entropy_per_token", "write max:diagnosis/entropy_per_token if more of it is better, min:"),
        ("rewards/accuracies", "did you mean rewards_eval/accuracies?"),
        ("eval_loss", "write max:eval_loss"),
        ("loss", "did you mean loss/eval?"),
    ],
)
def test_an_unknown_direction_is_refused_with_what_to_write(text, hint):
    (problem,) = keep_best_problems(*validated(*DPO, f"keep_best={text}"))
    assert problem.startswith(f"keep_best={text}: ") and hint in problem


@pytest.mark.parametrize(
    "values, best_step, waited",
    [
        ([0.5, 0.4, 0.6], 16, 1),
        ([0.5, 0.5], 8, 1),  # of equal ones the earlier
        ([math.nan, 0.9], 16, 0),
        ([0.5, math.nan], 8, 1),
        ([0.9, 0.8], 16, 0),  # the evaluation before the first update was better, but has no checkpoint
        ([], None, 0),
        ([math.nan], None, 1),
    ],
)
def test_the_best_evaluation_is_the_first_with_the_best_value_of_those_with_a_checkpoint(values, best_step, waited):
    progress, stop = judged(values, "keep_best=loss/eval")
    assert (progress.best_step, progress.waited, stop) == (best_step, waited, None)


@pytest.mark.parametrize("values", [[0.5, 0.6, 0.5], [0.5, 0.6, math.nan], [0.6, 0.5, 0.6, 0.7]])
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(values):
    progress, stop = judged(values, "keep_best=loss/eval", "stop_after=2")
    n = len(values)
    figure = pytest.approx(values[-1], nan_ok=True)
    assert stop == Stop(8 * n, n, 8 * n, [Cause("stop_after", 2, "loss/eval", figure, 0.5)]) and not stop.is_bad
    assert progress.best == 0.5


CASES = {
    "min_entropy": (0.5, "diagnosis/entropy_per_token", 1.0, 0.99),
    "max_entropy": (1.25, "diagnosis/entropy_per_token", 2.5, 2.51),
    "max_cross_entropy": (1.125, "diagnosis/kl_per_token", 0.25, 0.26),
    "max_unfinished": (0.5, "diagnosis/finished", 0.25, 0.24),
    "min_log_ratio": (-0.3, "diagnosis/chosen_log_ratio_per_token", -0.3, -0.31),
    "max_loss": (1.5, "loss/eval", 0.75, 0.76),
}


@pytest.mark.parametrize("setting", CASES)
def test_a_condition_is_kept_at_its_bound_and_broken_beyond_it(setting, tmp_path):
    value, metric, kept, broken = CASES[setting]
    judge = Judge(validated(*DPO, f"stop_if.{setting}={value}")[0])
    progress, _ = judge(Progress(), 0, 0, START)
    progress, stop = judge(progress, 8, 1, START | {metric: kept})
    assert stop is None and progress.good_step == 8
    after, stop = judge(progress, 16, 2, START | {metric: broken})
    assert stop is not None and stop.is_bad and after.good_step == stop.step == 8
    (cause,) = stop.causes
    assert cause.setting == f"stop_if.{setting}" and cause.value == value and metric in cause.metric
    assert cause.figure - cause.bound == pytest.approx(broken - kept)
    stop.write(tmp_path)
    assert Stop.read(tmp_path) == stop
    assert f"stop_if.{setting}={value}: {cause.metric} is {cause.figure:.4g}, the bound {cause.bound:.4g}" in str(stop)


def test_what_was_not_measured_breaks_nothing():
    judge = Judge(validated(*DPO, "stop_if=collapse")[0])
    progress, _ = judge(Progress(), 0, 0, {})
    assert (
        judge(progress, 8, 1, {"loss/eval": 9.0, "diagnosis/kl_per_token": 9.0})[1] is None
    )  # nothing to compare with
    progress, _ = judge(Progress(), 0, 0, START)
    assert judge(progress, 8, 1, {})[1] is None


def test_without_an_evaluation_before_the_first_update_no_later_one_takes_its_place():
    judge = Judge(validated(*DPO, "stop_if.max_loss=1.5", "do_first_eval=false")[0])
    progress, _ = judge(Progress(), 8, 1, {"loss/eval": 0.1})
    assert judge(progress, 16, 2, {"loss/eval": 9.0})[1] is None


@pytest.mark.parametrize("overrides, missing, named", [
    ((), (), 0),
    ((), ("diagnosis/finished",), 1),
    ((), START, 5),
    (("do_first_eval=false",), START, 0),  # said at the start of every run
    (("sample_during_eval=false",), START, 1),  # the loss; the others need samples, which is said at the start as well
])  # fmt: skip
def test_a_resumed_run_names_the_conditions_whose_start_was_not_measured(overrides, missing, named):
    settings, _ = validated(*DPO, "stop_if=collapse", *overrides)
    first = {name: value for name, value in START.items() if name not in missing}
    notes = resumed_notes(settings, first)
    assert len(notes) == named and all("is never checked" in note for note in notes)


def test_every_condition_is_a_setting_that_a_resumed_run_may_change():
    names = {condition.setting for condition in CONDITIONS}
    assert names == set(StopIfSettings.model_fields) == set(CASES)
    assert {f"stop_if.{name}" for name in names} <= set(MAY_CHANGE)


def test_the_conditions_of_a_run_are_those_that_are_set():
    assert Judge(validated(*DPO)[0]).bounds == {}
    assert {condition.setting for condition in Judge(validated(*DPO, "stop_if.max_loss=2")[0]).bounds} == {"max_loss"}
    assert {condition.setting for condition in Judge(validated(*DPO, "stop_if=collapse")[0]).bounds} >= {
        "max_cross_entropy"
    }


def test_a_metric_that_no_evaluation_has_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"keep_best=max:no/such: .* no such metric, but loss/eval, diagnosis/entropy"):
        judged([], "keep_best=max:no/such")
    with pytest.raises(UserError, match="no/such"):
        judged([0.5], "keep_best=max:no/such", start=False)


def test_a_metric_that_is_undefined_while_all_margins_are_0_is_accepted():
    assert judged([0.5], "keep_best=min:diagnosis/length_correlation")[0].waited == 1


@pytest.mark.parametrize(
    "settings, reason",
    [
        (["keep_best=diagnosis/kl", "sample_during_eval=false"], "sample_during_eval=false draws no samples"),
        (["keep_best=diagnosis/kl", "loss.precompute_reference=true"], "the reference is precomputed"),
        (["keep_best=max:diagnosis/kl_per_token", "loss.reference_free=true"], "the loss has no reference"),
        (["keep_best=diagnosis/displaced", "loss.reference_free=true"], "the loss has no reference"),
        (["loss=sft", "keep_best=rewards_eval/accuracies"], "the loss has no pairs"),
        (["keep_best=min:loss/train"], "it is a metric of updates"),
    ],
)
def test_a_metric_that_the_run_will_not_record_is_refused_beforehand(settings, reason):
    (problem,) = keep_best_problems(*validated(*DPO, *settings))
    assert problem.startswith("keep_best=") and reason in problem


@pytest.mark.parametrize(
    "settings", [["keep_best=diagnosis/kl"], ["keep_best=loss/eval", "sample_during_eval=false"], []]
)
def test_a_metric_that_the_run_will_record_is_no_problem(settings):
    assert keep_best_problems(*validated(*DPO, *settings)) == []


def test_conditions_that_are_never_checked_are_named():
    def notes(*settings):
        lines = stop_if_notes(*validated(*DPO, "stop_if=collapse", "n_eval_model_samples=64", *settings))
        return {line.partition("=")[0].removeprefix("stop_if.") for line in lines}

    of_samples = {"min_entropy", "max_entropy", "max_cross_entropy", "max_unfinished"}
    assert notes() == set()
    assert notes("sample_during_eval=false") == of_samples
    assert notes("loss.precompute_reference=true") == {"max_cross_entropy"}
    assert notes("do_first_eval=false") == of_samples | {"max_loss"}


def test_few_samples_are_named_once():
    (line,) = stop_if_notes(*validated(*DPO, "stop_if=collapse", "n_eval_model_samples=63"))
    assert line == "n_eval_model_samples=63: so few samples show only large changes to stop_if; set it to 64 or more."
    assert stop_if_notes(*validated(*DPO, "stop_if.max_loss=2", "n_eval_model_samples=63")) == []


@pytest.mark.parametrize(("figure", "breaks"), [(2.95, False), (2.96, True)])
def test_a_difference_that_chance_explains_breaks_nothing(figure, breaks):
    """The bound is 1.2 * 2 = 2.4 with an error of 1.2 * 0.2; 1.96 * sqrt(0.15^2 + 0.24^2) = 0.555."""
    judge = Judge(validated(*DPO, "stop_if.max_entropy=1.2")[0])
    entropy = "diagnosis/entropy_per_token"
    progress, _ = judge(Progress(), 0, 0, {entropy: 2.0, f"{entropy}_stderr": 0.2})
    _, stop = judge(progress, 8, 1, {entropy: figure, f"{entropy}_stderr": 0.15})
    assert (stop is not None) == breaks


def test_a_bound_relative_to_a_loss_that_is_not_above_0_is_never_broken():
    judge = Judge(validated(*DPO, "stop_if.max_loss=1.5")[0])
    progress, _ = judge(Progress(), 0, 0, {"loss/eval": -1.0})
    assert judge(progress, 8, 1, {"loss/eval": -0.9})[1] is None


def test_another_metric_begins_anew_and_keeps_what_the_conditions_know():
    progress, _ = judged([0.5, 0.6], "keep_best=loss/eval", "stop_if=collapse")
    assert Progress.load(progress.state_dict(), "loss/eval") == progress
    assert Progress.load(progress.state_dict(), None) == Progress(START, None, good_step=16)
    assert Progress.load({}, None) == Progress()


def test_a_stop_holds_until_each_of_its_settings_has_another_value():
    causes = [Cause("stop_if.max_entropy", 1.2, "a", 1.0, 0.5), Cause("stop_if.max_loss", 1.5, "b", 1.0, 0.5)]
    stop = Stop(16, 2, 8, causes)
    settings = ["stop_if.max_entropy=1.2", "stop_if.max_loss=1.5"]
    assert stop.holds(validated(*DPO, *settings)[0])
    assert stop.holds(validated(*DPO, *settings, "stop_if.max_entropy=1.3")[0])
    assert not stop.holds(validated(*DPO, "stop_if.max_entropy=1.3")[0])


def test_a_stop_without_a_good_checkpoint_is_an_error_of_its_own(tmp_path):
    with pytest.raises(RunError, match="nothing is exported; try a lower lr, or a smaller eval_every") as raised:
        Stop(8, 1, None, [Cause("stop_if.max_loss", 1.5, "loss/eval", 9.0, 1.0)]).report(tmp_path)
    assert raised.value.exit_code == 9


def test_a_damaged_record_of_a_stop_is_refused_by_name(tmp_path):
    assert Stop.read(tmp_path) is None
    (tmp_path / STOPPED).write_text("{}")
    with pytest.raises(UserError, match=f"{STOPPED}: cannot be read; remove it"):
        Stop.read(tmp_path)
