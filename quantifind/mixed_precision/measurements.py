"""Paired per-example losses of quantized candidates and the float network, cached so that nothing
is measured twice."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantifind.metrics import Outcome, columns_of, compared, gathered, judged
from quantifind.mixed_precision.passes import Passes
from quantifind.network.calibrated import Calibration
from quantifind.network.calibration import Batches as CalibrationBatches
from quantifind.network.calibration import calibration_batches
from quantifind.network.foldable import exact, foldable
from quantifind.network.folding import Pairs, prepared
from quantifind.network.modules import (
    plain_copy,
    run,
    unwrapped,
)
from quantifind.network.trace import ProductFacts, macs
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.finite import float_outcome
from quantifind.runtime.workers import Workers
from quantifind.storage.store import Store, fingerprint
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch, Forward, joined, regrouped, tensors_of
from quantifind.utils.criteria import Criterion
from quantifind.utils.devices import evaluating
from quantifind.utils.loaders import sample
from quantifind.utils.naming import naming

# of what is kept: another one is measured anew
FORMAT = "measured 3"
# beside which divergences are added up as losses are, or else are of logits:
# test_divergences_that_were_others_are_measured_anew
BY_SHARES = " by shares"
# examples of training data
CALIBRATION = 4_096
# seconds of work below which no task is split among workers, since each part has the candidates'
# codes sent along
BRIEF = 0.05
# which a worker finds anew where it needs them
LOOKED_UP = ("network", "facts", "products")
Columns = dict[str, np.ndarray]


@dataclass(eq=False)
class Measurements:
    """The losses of a network's quantized versions on validation data, in a seeded order of the
    examples; and the training data that calibrate them.

    train_loader, criterion, forward, seed, workers, max_memory: as `start` was given them.
    model: a plain copy of the network, with norms folded.
    folded: pairs of names, of the norms.
    calibration: batches of training data.
    evaluator: of the validation examples.
    original: the float network's outcome on them.
    pace: seconds that an example takes.
    passes: that were taken.
    store: of what has been measured.
    counted: by key of a candidate, examples that went through the network for it.
    """

    model: nn.Module
    folded: Pairs
    train_loader: Iterable[Any]
    criterion: Criterion | None
    forward: Forward | None
    calibration: CalibrationBatches
    evaluator: Evaluator
    original: Outcome
    pace: float
    passes: Passes
    store: Store
    seed: int
    workers: Workers
    max_memory: float | None = None
    counted: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        criterion: Criterion | None,
        *,
        forward: Forward | None = None,
        folder: Path | str | None = None,
        seed: int = 0,
        workers: Workers | None = None,
        max_memory: float | None = None,
    ) -> "Measurements":
        """Measure the float network.

        forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
        folder: keeps what is measured of this network on these data, in a folder of its own there;
            data that are drawn or augmented at random are other data each time.
        seed: of the order of the examples, and of which training data calibrate.
        workers: who measures, by default this process.
        max_memory: bytes that moments of inputs may take.
        Raises: ValueError for a split without examples, labels that the network has no outputs for,
            a batch that the network or the criterion does not take, and outputs or a loss that are
            not finite.
        """
        model = unwrapped(model)
        calibration = calibration_batches(
            sample(train_loader, CALIBRATION, seed=seed), model, forward, criterion
        )
        found = foldable(model, partial(run, batch=calibration[0]))
        found = exact(model, found, (partial(run, batch=batch) for batch in calibration))
        with naming("validation data"):
            evaluator = Evaluator(
                prepared(model, found), val_loader, criterion, forward=forward, seed=seed
            )
            judging = (partial(run, batch=batch) for batch in evaluator.given_batches())
            folded = exact(model, found, judging)
            if folded != found:
                net, given = prepared(model, folded), evaluator.given_batches()
                evaluator = Evaluator(net, given, criterion, forward=forward)
        model = prepared(model, folded)
        with evaluating(model), naming("training data"):
            run(plain_copy(model), calibration[0])
        started = time.perf_counter()
        original = float_outcome(evaluator, "validation data").calibrated()
        pace = (time.perf_counter() - started) / evaluator.examples
        passes = Passes(evaluator.examples)
        passes.add(evaluator.examples)
        # outputs and losses tell of a network's code and a criterion's options what their names
        # don't: test_other_options_have_a_folder_of_their_own
        given = evaluator.given_batches()
        made = _by_example(plain_copy(model), given, evaluator.criterion)
        data = [t for batch in (*given, *calibration) for t in tensors_of(batch.data)]
        # with less memory the same choices are other codes
        # (test_a_search_keeps_within_the_memory_that_is_allowed)
        memory = "" if max_memory is None else f" in {max_memory:g} bytes"
        kind = FORMAT + memory + (BY_SHARES if _adds_up(evaluator.criterion, original) else "")
        key = fingerprint(kind, model, str(model), seed, made, *data)
        store = Store(None if folder is None else Path(folder) / key[:16])
        return cls(
            model=model,
            folded=folded,
            train_loader=train_loader,
            criterion=evaluator.criterion,
            forward=forward,
            calibration=calibration,
            evaluator=evaluator,
            original=original,
            pace=pace,
            passes=passes,
            store=store,
            seed=seed,
            workers=workers or Workers(),
            max_memory=max_memory,
        )

    @cached_property
    def network(self) -> Calibration:
        """The network beside its calibration batches."""
        return Calibration(
            self.model, self.calibration, max_memory=self.max_memory, criterion=self.criterion
        )

    @cached_property
    def facts(self) -> list[ProductFacts]:
        """The products of a pass of each calibration batch."""
        self.passes.add(sum(map(len, self.calibration)))
        return self.network.facts

    @cached_property
    def products(self) -> list[ProductFacts]:
        """Those of the first calibration batch, all of whose MACs are known."""
        return macs(self.model, self.calibration[0])

    @property
    def examples(self) -> int:
        return self.evaluator.examples

    def some_calibration(self, examples: int, together: int) -> list[Batch]:
        """Of so many of the calibration examples, so many at a time; batches stay as they are where
        the evaluator's do (test_rows_that_are_no_examples_stay_together)."""
        whole = joined(self.calibration) if self.evaluator.whole is not None else None
        if whole is not None:
            return regrouped([whole[:examples]], together)
        before = itertools.accumulate(map(len, self.calibration), initial=0)
        return [
            one for one, count in zip(self.calibration, before, strict=False) if count < examples
        ]

    def columns(self, key: str, quantized: Quantized, examples: int | None = None) -> Columns:
        """A row per example: the columns of `quantifind.metrics.paired`, and ``divergence``.

        key: a stable key of this candidate; examples that were measured before are not again.
        examples: the first so many, by default all.
        """
        return self.all_columns({key: quantized}, examples)[key]

    def all_columns(
        self,
        candidates: Mapping[str, Quantized],
        examples: int | None = None,
        *,
        gains: bool = True,
    ) -> dict[str, Columns]:
        """The `columns` of several candidates by their keys, measured by the workers.

        gains: whether with ``scaled_loss``, which is most of what is kept of an example.
        """
        wanted = self.evaluator.aligned(self.examples if examples is None else examples)
        kept = {key: self._kept(key) for key in candidates}
        taken = {key: self._taken(key) for key in candidates}
        # those in which the same tensor alone has changed are measured together
        groups: dict[Any, list[str]] = defaultdict(list)
        for key, quantized in candidates.items():
            done = len(kept[key]["loss"]) if kept[key] else 0
            if done < wanted:
                together = len(groups) if _alone(quantized) is None else _alone(quantized)
                groups[done, together].append(key)
        shares = math.ceil(self.workers.places / len(groups)) if groups else 1
        spans = [
            (keys, first, last)
            for (done, _), keys in groups.items()
            for first, last in self._spans(done, wanted, shares, len(keys))
        ]
        tasks = [([candidates[key] for key in keys], *span, gains) for keys, *span in spans]
        measured = self.workers.map(_measure, self, tasks)
        for (keys, *_), (columns, examples_taken) in zip(spans, measured, strict=True):
            for key, fresh in zip(keys, columns, strict=True):
                whole = kept[key]
                whole = {n: np.concatenate([whole[n], c]) if whole else c for n, c in fresh.items()}
                taken[key] += examples_taken / len(keys)
                tensors = {name: torch.from_numpy(c) for name, c in whole.items()}
                self.store.put(key, tensors, {"taken": taken[key]})
                kept[key] = whole
        for key in candidates:
            # what was kept counts as if it were measured now: a search that goes on takes the same
            # course (test_a_killed_search_goes_on)
            counted = taken[key] * wanted / len(kept[key]["loss"])
            self.passes.add(max(counted - self.counted.get(key, 0.0), 0.0))
            self.counted[key] = max(counted, self.counted.get(key, 0.0))
        return {key: {n: c[:wanted] for n, c in kept[key].items()} for key in candidates}

    def _spans(self, first: int, last: int, shares: int, together: int) -> list[tuple[int, int]]:
        """What of the examples each of several workers measures, of so many candidates: whole
        batches, so that the results are those of one span (test_spans_are_of_whole_batches)."""
        took = (last - first) * self.pace * together
        shares = max(1, min(shares, int(took / BRIEF)))
        batch = self.evaluator.batch or 1
        step = batch * math.ceil((last - first) / (batch * shares))
        ends = [self.evaluator.aligned(end) for end in range(first + step, last, step)]
        return list(itertools.pairwise(dict.fromkeys([first, *ends, last])))

    def _kept(self, key: str) -> Columns:
        entry = self.store.get(key)
        return {} if entry is None else {name: t.numpy() for name, t in entry[0].items()}

    def _taken(self, key: str) -> float:
        entry = self.store.get(key)
        return 0.0 if entry is None else float(entry[1]["taken"])

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: neither what was measured nor the training data."""
        left = {"train_loader": (), "store": Store(), "workers": Workers()}
        return {name: v for name, v in self.__dict__.items() if name not in LOOKED_UP} | left


def _by_example(
    model: nn.Module, batches: Iterable[Batch], criterion: Criterion | None
) -> dict[str, torch.Tensor]:
    """The losses, their weights and the outputs' norms, (examples,) each, whatever the layout of a
    pass."""
    with evaluating(model):
        made = (judged(criterion, *batch.clone().run(model)) for batch in batches)
        found = gathered(compared(one, one) for one in made)
    return {name: found[name] for name in ("loss", "weight", "squared_norm")}


def _adds_up(criterion: Any, original: Outcome) -> bool:
    """Whether a divergence is another than where it was the mean over outputs."""
    summed = getattr(criterion, "reduction", "mean") == "sum"
    # a criterion of one's own, of labels by position
    placed = original.classes is None and any(part["weight"].dim() > 1 for part in original.parts)
    return summed or placed or isinstance(criterion, nn.MultiLabelSoftMarginLoss)


def _alone(quantized: Quantized) -> str | None:
    """The one tensor that has changed, or None."""
    if quantized.activations or len(quantized.tensors) != 1:
        return None
    return next(iter(quantized.tensors))


def _measure(
    measurements: Measurements, task: tuple[Sequence[Quantized], int, int, bool]
) -> tuple[list[Columns], float]:
    """Their columns, and how many examples went through the network for them."""
    (candidates, *span, gains), evaluator = task, measurements.evaluator
    name, beside, before = _alone(candidates[0]), measurements.original, evaluator.taken
    if name is None:
        measured = [evaluator.outcome(q, *span, beside=beside) for q in candidates]
    else:
        parts = [quantized.tensors[name] for quantized in candidates]
        measured = evaluator.one_tensor(name, parts, *span, beside=beside)
    columns = [columns_of(one) for one in measured]
    for one in columns:
        if "scaled_loss" in one:
            losses = one.pop("scaled_loss")
            # of squares the last digits are all there is: test_the_gain_of_a_tiny_error_is_exact
            kind = np.float32 if losses.shape[1] > 3 else np.float64
            one |= {"scaled_loss": losses.astype(kind)} if gains else {}
    return columns, evaluator.taken - before
