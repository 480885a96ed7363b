"""Records losses on pairs of responses: DPO, IPO, SPPO, SimPO, ORPO and KTO, with their gradients.

    make peers && .peers/bin/python tests/golden/record_offline.py

Of TRL 1.16, whose trainers' methods are executed from the installed source on a trainer that has
log-probabilities in place of a model, and of OpenRLHF's DPOLoss.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from golden.inputs import generator, masks  # noqa: E402
from golden.record import Book  # noqa: E402
from torch import Tensor  # noqa: E402

from rlhf_kernels.stacks import activate  # noqa: E402
from rlhf_kernels.stacks.source import extract, find_source  # noqa: E402

PAIRS, LENGTH = 4, 7
SPREADS = (0.3, 3.0)
WRT = ("logprob",)


def cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Log-probabilities of tokens [2 * pairs, T] under policy and reference, chosen first, and their mask."""
    for i, (name, mask) in enumerate((n, m) for n, m in masks(2 * PAIRS, LENGTH) if n in ("full", "tail")):
        for j, spread in enumerate(SPREADS):
            draws = torch.randn(4, 2 * PAIRS, LENGTH, generator=generator(7, i, j), dtype=torch.float64)
            reference = -draws[0].abs()
            # A log-probability is below 0.
            logprob = -(reference + spread * draws[1]).abs()
            other = -(reference + spread * draws[2]).abs()
            rows = {"logprob": logprob, "reference": reference, "other": other}
            rows["other_reference"] = -draws[3].abs()
            yield (
                f"{name}/{spread:g}",
                {name: value.masked_fill(~mask, 0.0).float() for name, value in rows.items()}
                | {"mask": mask},
            )


def trainer(**settings: Any) -> SimpleNamespace:
    """What TRL's methods ask of a trainer."""
    alone = dict.fromkeys(("gather", "gather_for_metrics", "unwrap_model"), lambda x: x)
    accelerator = SimpleNamespace(device=torch.device("cpu"), **alone)
    return SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
        precompute_ref_logps=True, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        _tp_size=1, **settings,
    )  # fmt: skip


def found(logprob: Tensor) -> SimpleNamespace:
    """The outputs of a model, of which only the log-probabilities matter."""
    zero = torch.zeros_like(logprob)
    return SimpleNamespace(log_probs=logprob, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def with_prompt(mask: Tensor) -> Tensor:
    """The mask of completions after a prompt of one token."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()


def dpo() -> Any:
    """TRL's DPOTrainer._compute_loss."""
    namespace: dict[str, Any] = {
        "torch": torch, "F": F, "math": math, "is_peft_model": lambda _: False, "nullcontext": nullcontext
    }  # fmt: skip
    path = find_source("trl/trainer/dpo_trainer.py")
    theirs = extract(path, "DPOTrainer._compute_loss", namespace=namespace)

    def run(logprob: Tensor, reference: Tensor, mask: Tensor, loss: str, beta: float) -> Tensor:
        whole = with_prompt(mask)
        chosen, rejected = reference.sum(1).chunk(2)
        me = trainer(
            ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=beta,
            label_smoothing=0.0, use_weighting=False,
        )  # fmt: skip
        inputs = {
            "input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole,
            "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
        }  # fmt: skip
        return theirs["_compute_loss"](me, lambda **_: found(logprob), inputs, False)

    return run


def kto() -> Any:
    """TRL's KTOTrainer._compute_loss; the first half of the rows is desirable."""
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    path = find_source("trl/trainer/kto_trainer.py")
    theirs = extract(path, "KTOTrainer._compute_loss", namespace=namespace)

    def run(logprob, reference, other, other_reference, mask, beta, desirable, undesirable):
        whole = with_prompt(mask)
        me = trainer(
            calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=desirable,
            undesirable_weight=undesirable, _compute_kl_logps=lambda model, batch: other.sum(1),
        )  # fmt: skip
        inputs = {
            "input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole,
            "label": torch.arange(len(mask)) < len(mask) // 2, "ref_logps": reference.sum(1),
            "ref_KL_logps": other_reference.sum(1),
        }  # fmt: skip
        return theirs["_compute_loss"](me, lambda **_: found(logprob), inputs, False)

    return run


def simpo() -> Any:
    """TRL's CPOTrainer.cpo_loss on log-probabilities per token."""
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    path = find_source("trl/experimental/cpo/cpo_trainer.py")
    theirs = extract(path, "CPOTrainer.cpo_loss", namespace=namespace)

    def run(logprob: Tensor, mask: Tensor, beta: float, gamma: float) -> Tensor:
        me = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0)
        chosen, rejected = (logprob.sum(1) / mask.sum(1)).chunk(2)
        return theirs["cpo_loss"](me, chosen, rejected)[0]

    return run


def orpo() -> Any:
    """TRL's ORPOTrainer.odds_ratio_loss on log-probabilities per token: the part beside imitation."""
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    path = find_source("trl/experimental/orpo/orpo_trainer.py")
    theirs = extract(path, "log1mexp", "ORPOTrainer.odds_ratio_loss", namespace=namespace)

    def run(logprob: Tensor, mask: Tensor, weight: float) -> Tensor:
        chosen, rejected = (logprob.sum(1) / mask.sum(1)).chunk(2)
        return theirs["odds_ratio_loss"](trainer(beta=weight), chosen, rejected)[0]

    return run


def openrlhf() -> Any:
    """OpenRLHF's DPOLoss."""
    namespace: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": F, "Tuple": tuple}
    theirs = extract(find_source("openrlhf/models/loss.py"), "DPOLoss", namespace=namespace)

    def run(logprob: Tensor, reference: Tensor, beta: float, smoothing: float, ipo: bool) -> Tensor:
        sums = (*logprob.sum(1).chunk(2), *reference.sum(1).chunk(2))
        return theirs["DPOLoss"](beta, smoothing, ipo)(*sums)[0]

    return run


def record_offline(book: Book) -> None:
    """Every loss for every case."""
    trl, theirs = ("trl", version("trl")), ("openrlhf", version("openrlhf"), "DPOLoss")
    runs = {"dpo": dpo(), "kto": kto(), "simpo": simpo(), "orpo": orpo(), "openrlhf": openrlhf()}

    def add(source: tuple[str, str, str], case: str, run: str, x: dict[str, Tensor], **kwargs: Any) -> None:
        book.add(source, case, runs[run], x, kwargs, wrt=WRT, outputs=("loss",))

    for case, x in cases():
        both = {name: x[name] for name in ("logprob", "reference", "mask")}
        mine = {name: x[name] for name in ("logprob", "mask")}
        for loss in ("sigmoid", "ipo", "sppo_hard"):
            add((*trl, "DPOTrainer._compute_loss"), case, "dpo", both, loss=loss, beta=0.1)
        add((*trl, "KTOTrainer._compute_loss"), case, "kto", x, beta=0.2, desirable=1.0, undesirable=1.5)
        add((*trl, "CPOTrainer.cpo_loss"), case, "simpo", mine, beta=2.0, gamma=0.5)
        add((*trl, "ORPOTrainer.odds_ratio_loss"), case, "orpo", mine, weight=0.1)
        plain = {name: x[name] for name in ("logprob", "reference")}
        for smoothing, ipo in ((0.0, False), (0.1, False), (0.0, True)):
            add(theirs, case, "openrlhf", plain, beta=0.1, smoothing=smoothing, ipo=ipo)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    activate()
    book = Book("offline")
    record_offline(book)
    book.save()
