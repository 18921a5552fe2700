"""CostModel: sums that one can check in the head."""

import math

import jax
import pytest
from hypothesis import given
from strategies import plans

from jaxpack import BucketPlan, CostModel, plan_padded

STAIRS = BucketPlan((2, 4), (3, 1))  # 8 cells, 4 steps, 2 buckets


def test_run_time_counts_cells_steps_and_buckets():
    assert CostModel(cell=1, step=10, bucket=0).run_time(STAIRS) == 48
    assert CostModel(cell=1, step=0, bucket=100).run_time(STAIRS) == 208


def test_compile_time_counts_buckets():
    assert CostModel(compilation=3).compile_time(STAIRS) == 6


def test_total_spreads_compilation_over_the_runs():
    assert CostModel(cell=1, step=0, bucket=0, compilation=50, runs=10).total(STAIRS) == 8 + 2 * 50 / 10
    assert CostModel(cell=1, step=0, bucket=0, compilation=50, runs=1).total(STAIRS) == 8 + 2 * 50


@given(plans)
def test_a_bucket_that_saves_bucket_cells_pays_exactly_for_itself(plan):
    model = CostModel(cell=2, step=3, bucket=5, compilation=70, runs=10)
    assert model.bucket_cells == 6
    rest = model.cell * plan.size + model.step * plan.num_steps
    assert model.total(plan) == pytest.approx(rest + model.cell * model.bucket_cells * plan.num_buckets)


def test_where_slots_share_rows_each_cell_costs_a_crossing_more():
    model, shared = CostModel(crossing=5), BucketPlan((4,), (2,), ((0, 1), (0, 2)))
    assert model.total(shared) - model.total(plan_padded(2, 4)) == pytest.approx(5 * 8)


def test_where_slots_share_rows_each_step_costs_a_crossing_step_more():
    model, shared = CostModel(crossing=0, crossing_step=5), BucketPlan((4,), (2,), ((0, 1), (0, 2)))
    assert model.total(shared) - model.total(plan_padded(2, 4)) == pytest.approx(5 * 4)


def test_a_bare_cost_model_is_that_of_training_on_a_cpu():
    assert CostModel.for_platform("cpu") == CostModel.for_platform("cpu", training=True) == CostModel()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("field", ["cell", "step", "bucket", "compilation"])
def test_a_forward_pass_costs_less_than_a_training_step(platform, field):
    training, forward = (getattr(CostModel.for_platform(platform, training=each), field) for each in (True, False))
    assert 0 < forward < training


def test_a_cost_model_by_platform_takes_its_names_and_its_default():
    assert CostModel.for_platform("cuda") == CostModel.for_platform("rocm") == CostModel.for_platform("gpu")
    assert CostModel.for_platform() == CostModel.for_platform(jax.default_backend())
    with pytest.raises(ValueError, match=r"platform must be one of cpu, gpu, cuda, rocm, tpu.* got 'h100'"):
        CostModel.for_platform("h100")


def test_steps_are_dearest_on_a_gpu():
    steps = {platform: (m := CostModel.for_platform(platform)).step / m.cell for platform in ("cpu", "tpu", "gpu")}
    assert steps["cpu"] < steps["tpu"] < steps["gpu"]


def test_cost_models_compare_and_hash_by_value():
    assert CostModel(runs=9) == CostModel(runs=9) != CostModel()
    assert len({CostModel(), CostModel(runs=9), CostModel()}) == 2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"cell": 0}, "cell must be above 0"),
        ({"cell": -1}, "cell must be 0 or more and finite, got -1"),
        ({"step": -1e-9}, "step must be 0 or more and finite, got -1e-09"),
        ({"bucket": math.nan}, "bucket must be 0 or more and finite, got nan"),
        ({"compilation": math.inf}, "compilation must be 0 or more and finite, got inf"),
        ({"runs": 0.5}, "runs must be at least 1, got 0.5"),
    ],
)
def test_costs_that_make_no_sense_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        CostModel(**numbers)
