"""What a run has recorded when it began, for the one that resumes it: settings, plan, and what it read."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruned_ops.checkpoints.sentence_folder import modules_of
from pruned_ops.files import digest, read_json
from pruned_ops.shape import checked_int
from pruned_trainer.jobs.output import RUN
from pruned_trainer.jobs.plan import Plan
from pruned_trainer.jobs.settings import PruneSettings

_DIGEST = re.compile("[0-9a-f]{64}")


def recorded_plan(partial: Path, settings: PruneSettings) -> Plan:
    """The plan of the interrupted run; ValueError where that run had other settings, or left no record."""
    record, reason = partial / RUN, ""
    try:
        recorded = read_json(record, "record of a run")
        plan = Plan(**recorded["plan"])
        for name in ("gate_steps", "retrain_steps"):
            checked_int(f"{record}: plan.{name}", getattr(plan, name), 0)
        known: Mapping[str, Any] = dict(recorded["settings"])
        if "targets" not in known:
            raise KeyError("targets")
    except KeyError as error:
        reason = f"{record} has no {error}"
    except (TypeError, AttributeError):
        reason = f"{record} is no record of a run"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{partial} holds no run that can be resumed ({reason}); --overwrite starts anew")
    differing = settings.differences(known)
    if differing:
        raise ValueError(
            f"{partial} was started with other settings: {', '.join(differing)}; give the same ones to "
            "--resume, or --overwrite to start anew"
        )
    return plan


def digests_of(settings: PruneSettings) -> dict[str, str]:
    """The digests of the files and folders that a run reads, by their paths. Errors: `modules_of`'s."""
    checkpoints = (settings.model, settings.teacher)
    digests = {}
    for source in settings.inputs:
        if source is None or source == settings.cache_teacher:  # which the run writes
            continue
        path = Path(source)
        if path.exists():  # else it is of the hub
            digests[str(path.resolve())] = digest(path, *(_read_of(path) if source in checkpoints else ()))
    return digests


def _read_of(checkpoint: Path) -> list[str]:
    """The patterns of what is read of a checkpoint's folder: the files in it, and all in those of its
    modules, which say how an embedder is pooled. What else lies there may be earlier checkpoints."""
    folders = [glob.escape(module.path) for module in modules_of(str(checkpoint))]
    return ["*.*", *(f"{folder}/**/*" for folder in folders if folder.strip("./"))]


def check_unchanged(partial: Path, digests: Mapping[str, str]) -> None:
    """Refuse to go on with other data, weights or functions than the interrupted run began with. digests: of
    each by its name in messages, or what it is, in words, which the message then tells."""
    known = read_json(partial / RUN, "record of a run").get("inputs")
    known = known if isinstance(known, dict) else {}  # earlier versions recorded none
    changed = [
        name if _DIGEST.fullmatch(current) else f"{name} ({known[name]} then, {current} now)"
        for name, current in digests.items()
        if known.get(name, current) != current
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changed since {partial} was started: put back what was there to --resume, "
            "or give --overwrite to start anew"
        )
