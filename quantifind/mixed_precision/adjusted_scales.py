"""A candidate again, its scales fitted to follow the float network's outputs; kept where validation
data say that nothing is worse."""

from itertools import accumulate

from quantifind.mixed_precision.candidates import Candidates, Row
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.runtime.scale_fitting import TAKEN, fit_scales
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch

# of the passes that are left, fitting takes at most this share; and as many examples at least
SHARE, LEAST = 0.25, 64


def adjust_scales(candidates: Candidates, row: Row) -> Row:
    """A candidate with fitted scales, which is kept beside it; or itself, where that is worse by
    one of `_measures` (test_adjusted_scales_are_never_worse), or the candidate was given up."""
    measurements = candidates.measurements
    if not candidates.is_whole(row):
        return row
    batches = _affordable(measurements)
    if not batches:
        measurements.passes.stopped("fitting of scales")
        return row
    fitted = _fitted(measurements, row["key"], row["quantized"], batches)
    if fitted is None:
        return row
    trial = candidates.fitted(row, fitted, sum(map(len, batches)))
    (other,) = candidates.measured([trial])
    if not candidates.is_whole(other):
        return row
    before, after = (_measures(candidates, one) for one in (row, other))
    if not all(new <= old for new, old in zip(after, before, strict=True)):
        return row
    candidates.keep(other)
    return other


def _measures(candidates: Candidates, row: Row) -> list[float]:
    """What fitted scales may not make larger, on all validation examples."""
    columns = candidates.columns(row)
    measured = {candidates.goal.measure, *candidates.goal.limits, "calibrated_ratio"} & row.keys()
    found = [float(row[f"{name}_bound"]) for name in sorted(measured)]
    found.append(float(columns["divergence"].sum()))
    return [*found, -_right(columns)] if "correct" in columns else found


def _right(columns: Columns) -> float:
    """How many answers are right, less what is ignored."""
    return float(columns["correct"][columns["weight"] > 0].sum())


def _affordable(measurements: Measurements) -> list[Batch]:
    """Calibration batches, the first ones where all would take too many passes."""
    passes, batches = measurements.passes, list(measurements.calibration)
    most = SHARE * passes.left * passes.examples / TAKEN
    ends = list(accumulate(map(len, batches)))
    if most >= ends[-1]:
        return batches
    chosen = [batch for batch, end in zip(batches, ends, strict=True) if end <= most]
    return chosen if sum(map(len, chosen)) >= LEAST else []


def _fitted(
    measurements: Measurements, key: str, quantized: Quantized, batches: list[Batch]
) -> Quantized | None:
    """With the scales that were fitted, or as they are kept; None where they stay."""
    examples, store = sum(map(len, batches)), measurements.store
    key = f"scales of {examples} examples {key}"
    if (kept := store.get(key)) is None:
        found = fit_scales(
            measurements.model,
            quantized,
            batches,
            measurements.criterion,
            gain=measurements.original.gain or 1.0,
            seed=measurements.seed,
            step=measurements.passes.check_time,
        )
        scales = {
            name: tensor.qparams.scale
            for name, tensor in found.quantized.tensors.items()
            if tensor is not quantized.tensors[name] and tensor.qparams.scale is not None
        }
        kept = scales, {"examples": found.examples, "note": found.note}
        store.put(key, *kept)
    # what was kept counts as if it were fitted now: test_a_killed_search_goes_on
    scales, values = kept
    measurements.passes.add(values["examples"])
    if values["note"]:
        measurements.passes.stopped(f"fitting of scales ({values['note']})")
    return quantized.with_scales(scales) if scales else None
