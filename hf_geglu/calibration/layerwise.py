"""`calibrate` for a model that does not fit into memory: one layer's weights at a time.

The same sites, sums, fits and choices. All batches pass a layer while its weights are in memory, so that the weights
are read four times, however much data there are: forward, backward for the fits, backward for the trial, and once more
to measure the converted model. What layers return lies on disk meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.calibration.backward import Backward
from hf_geglu.calibration.budget import Measured, Meter
from hf_geglu.calibration.calibrate import Calibrated, concluded
from hf_geglu.calibration.choosing import CORRECTED, PER_NEURON, Outcome, choose
from hf_geglu.calibration.correction import Correction, Metric, groups
from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.gather import Progress, Statistic, Together, mask_of
from hf_geglu.calibration.histogram import WeightedHistogram
from hf_geglu.calibration.lines import down_matrix, fit_site, fitted_sites
from hf_geglu.calibration.seen import Seen, watching
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.calibration.trial import Trial
from hf_geglu.choice import TABLE
from hf_geglu.conversions import Coefficients
from hf_geglu.distance import Outputs, is_causal
from hf_geglu.files.whole import write_whole
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites import FoundSites, Site
from hf_geglu.sites.weights import is_stack
from hf_geglu.streaming import Player, Read, Residency, Tape, Unit, divide
from hf_geglu.surgery import Fits, installed


def calibrate_layerwise(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    read: Read,
    *,
    found: FoundSites,
    shelf: Shelf,
    max_kl: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibrated:
    """`calibrate`, layer by layer.

    In memory at a time: the tensors of one layer, converted and not; the sums of its sites (the correction's take
    4 F (F + D) bytes a block); one batch in one layer, or in what follows the last one; and the gradients that the
    batches carry from layer to layer. The numbers are those of `calibrate` up to rounding: the same operations on the
    same batches, and on the CPU, in all architectures tested, the same bits.

    Args:
        model: whose parameters are on the meta device, and whose buffers are computed.
        plan: from `make_plan`.
        data: every fourth batch is held out.
        read: reads tensors of the checkpoint.
        found: the sites of the model.
        shelf: keeps what layers return (tokens x D numbers a layer) and what was found so far; the same call goes on
            there after it was killed, and ends with the same bits. Its folder can be removed when this returns.
        max_kl: see `calibrate`; each of about log2(blocks) trials reads the weights once more.
        seed: see `calibrate`.
        progress: called with (layers passed by a batch, of about how many).

    Raises:
        StreamError: the model cannot be run layer by layer, see the reason.
        DataError: too little data.
        PlanError: see `calibrate`.
    """
    units = divide(model, [entry.site for entry in plan.sites])
    work = _Work(Residency(model, units, read), plan, data, shelf, seed, progress)
    chosen = choose(plan, work.outcomes(), work.reasons, data, seed=seed)
    return concluded(model, chosen, measure=work.measure, max_kl=max_kl, found=found)


class _Work:
    """The sweeps of one calibration."""

    def __init__(
        self,
        residency: Residency,
        plan: Plan,
        data: CalibrationData,
        shelf: Shelf,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._residency, self._model, self._shelf, self._seed = residency, residency.model, shelf, seed
        self._used, self._held = data.split()
        entries, self.reasons = fitted_sites(self._model, plan.converted)
        self._entries: dict[str, list[SitePlan]] = {}
        for entry in entries:
            self._entries.setdefault(residency.units.of(entry.site.block).path, []).append(entry)
        layers = sum(unit.layer for unit in residency.units.units)
        everything = 2 * len(self._used.batches) + 3 * len(self._held.batches)
        self._total, self._done, self._progress = layers * everything, 0, progress
        self._lines: dict[str, dict[str, Coefficients]] = {}
        self._direct: dict[str, bool] = {}

    def outcomes(self) -> dict[str, Outcome]:
        """Of all candidates of every site."""
        held = self._player(self._held, "held-out")
        with held.listening():
            held.play(lambda batch, outputs: write_whole(self._before(batch), dict(outputs), {}), self._tell)
            if not self._entries:
                return {}
        self._fit()
        with held.listening():
            return self._try(held)

    def _player(self, data: CalibrationData, name: str, **settings: Any) -> Player:
        return Player(self._residency, data.batches, Tape(self._shelf.folder / name), **settings)

    def _before(self, batch: int) -> Path:
        """Where the original's outputs of a held-out batch are."""
        return self._shelf.path(f"outputs-{batch}")

    def _tell(self, *_: Any) -> None:
        self._done = min(self._done + 1, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _sites(self) -> dict[str, list[Site]]:
        return {unit: [entry.site for entry in entries] for unit, entries in self._entries.items()}

    def _fit(self) -> None:
        """Lines for all sites, by the backward sweep and, in each layer, one more forward for the corrections."""
        kept = self._shelf.read_lines("lines")
        if kept is None:
            player = self._player(self._used, "used")
            with player.listening():
                player.play(lambda batch, outputs: None, self._tell)
                kept = self._fitted(player)
            self._shelf.write_lines("lines", *kept)
        for name in ("used", "backward-used", *(f"lines-{path}" for path in self._entries)):
            self._shelf.drop(name)
        lines, direct = kept
        for entry in (entry for entries in self._entries.values() for entry in entries):
            found = lines.get(entry.site.up, {})
            table = {TABLE: Coefficients.of(entry.scaling)}
            self._lines[entry.site.up] = table | {
                name: found[name] for name in (PER_NEURON, CORRECTED) if name in found
            }
            self._direct[entry.site.up] = direct.get(entry.site.up, True)

    def _fitted(self, player: Player) -> tuple[dict[str, dict[str, Coefficients]], dict[str, bool]]:
        def begin(unit: Unit) -> Mapping[str, Statistic]:
            return {
                entry.site.up: Together(
                    histogram=WeightedHistogram(entry.site, down_matrix(self._model, entry.site)),
                    metric=Metric(entry.site.d_out),
                )
                for entry in self._entries[unit.path]
            }

        def end(unit: Unit, statistics: Mapping[str, Statistic]) -> None:
            lines, direct = self._solved(player, unit, statistics)
            self._shelf.write_lines(f"lines-{unit.path}", lines, direct)

        sweep = Backward(player, self._sites(), seed=self._seed, shelf=self._shelf, name="backward-used")
        sweep.run(begin, end, self._tell)
        lines: dict[str, dict[str, Coefficients]] = {}
        direct: dict[str, bool] = {}
        for path in self._entries:
            kept = self._shelf.read_lines(f"lines-{path}")
            if kept is not None:  # None: no token came to that layer
                lines |= kept[0]
                direct |= kept[1]
        return lines, direct

    def _solved(
        self, player: Player, unit: Unit, statistics: Mapping[str, Statistic]
    ) -> tuple[dict[str, dict[str, Coefficients]], dict[str, bool]]:
        lines: dict[str, dict[str, Coefficients]] = {}
        direct: dict[str, bool] = {}
        corrected = []
        parts: dict[str, Mapping[str, Any]] = {}
        for entry in self._entries[unit.path]:
            statistic = statistics[entry.site.up]
            assert isinstance(statistic, Together)
            parts[entry.site.up] = statistic.parts
            histogram: WeightedHistogram = parts[entry.site.up]["histogram"]
            lines[entry.site.up] = {PER_NEURON: fit_site(self._model, entry, histogram)}
            direct[entry.site.up] = bool(histogram.direct)
            if not is_stack(entry.site.projection) and histogram.direct:
                corrected.append(entry)
        for group in groups(corrected):
            sums = {
                entry.site.up: Correction(
                    entry, lines[entry.site.up][PER_NEURON], parts[entry.site.up]["histogram"].down
                )
                for entry in group
            }
            self._forward(player, unit, [entry.site for entry in group], sums)
            for up, found in sums.items():
                line = found.solved(parts[up]["metric"].sum_DD)
                if line is not None:
                    lines[up][CORRECTED] = line
        return lines, direct

    def _forward(self, player: Player, unit: Unit, sites: Sequence[Site], sums: Mapping[str, Statistic]) -> None:
        """All calls of one layer again, whose weights are in memory."""

        def on_seen(seen: Seen) -> None:
            sums[seen.site.up].update(seen)

        with torch.no_grad(), watching(self._model, sites, on_seen, gradients=False) as told:
            for batch, inputs in enumerate(player.batches):
                told(mask_of(inputs))
                for call, path in enumerate(player.tape.units(batch)):
                    if path == unit.path:
                        player.call(unit, player.arguments(batch, call))

    def _try(self, player: Player) -> dict[str, Outcome]:
        """All lines on the held-out data."""

        def begin(unit: Unit) -> Mapping[str, Statistic]:
            return {
                entry.site.up: Trial(
                    entry.site,
                    entry.scaling.gate,
                    self._lines[entry.site.up],
                    down_matrix(self._model, entry.site) if self._direct[entry.site.up] else None,
                )
                for entry in self._entries[unit.path]
            }

        def end(unit: Unit, statistics: Mapping[str, Statistic]) -> None:
            found = {}
            for up, trial in statistics.items():
                assert isinstance(trial, Trial)
                outcome = Outcome.of(trial)
                found[up] = [outcome.errors, outcome.costs, outcome.tokens]
            self._shelf.write(f"trial-{unit.path}", {"none": torch.zeros(0)}, found)

        sweep = Backward(player, self._sites(), seed=self._seed + 1, shelf=self._shelf, name="backward-held-out")
        sweep.run(begin, end, self._tell)
        outcomes: dict[str, Outcome] = {}
        for path, entries in self._entries.items():
            kept = self._shelf.read(f"trial-{path}")
            for entry in entries:
                lines = self._lines[entry.site.up]
                outcome = Outcome(candidates=lines, errors=dict.fromkeys(lines, 0.0), costs={}, tokens=0)
                if kept is not None:  # None: no token came to that layer
                    errors, costs, tokens = kept[1][entry.site.up]
                    outcome = Outcome(candidates=lines, errors=errors, costs=costs, tokens=tokens)
                outcomes[entry.site.up] = outcome
        return outcomes

    def measure(self, plan: Plan, fits: Fits) -> Measured:
        """What the whole conversion costs on the held-out data."""
        meter = Meter(causal=is_causal(self._model))
        shutil.rmtree(self._shelf.folder / "converted", ignore_errors=True)  # of another plan, or half of this one

        def dress(unit: Unit) -> AbstractContextManager[None]:
            return installed(self._model, plan, fits, paths=lambda path: path in unit)

        def finished(batch: int, outputs: Outputs) -> None:
            from safetensors.torch import load_file

            meter.add(load_file(self._before(batch)), outputs, player.batches[batch])

        player = self._player(self._held, "converted", dress=dress)
        with player.listening():
            player.play(finished, self._tell)
        self._shelf.drop("converted")
        return meter.measured
