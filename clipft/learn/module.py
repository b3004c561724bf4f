"""Both encoders and the contrastive step as a LightningModule: wiring only."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipft.config import LossConfig, OptimConfig
from clipft.data.loader import Batch
from clipft.learn.average import Average
from clipft.learn.losses import Loss
from clipft.learn.optimizer import (
    build_optimizer,
    gradient_norm,
    parameter_groups,
    set_options,
    skips_by_itself,
    trained_by,
)
from clipft.learn.schedule import lr_at
from clipft.learn.step import Towers, contrastive_backward
from clipft.model.groups import TOWERS, is_frozen, tower_modules

# CLIP found a scale above 100 to destabilise training under its softmax (Radford et al. 2021, sec. 2.5).
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Plan:
    """What the steps of a run have in common."""

    num_steps: int
    warmup_steps: int
    batch_size: int
    micro_batch: int
    lr: float
    multipliers: dict[str, float]
    """Of the rate, by parameter."""
    ema: float | None
    seed: int
    train_batch_norm: bool
    clamp_scale: bool
    """Whether a learned scale stays below MAX_LOGIT_SCALE."""
    with_ids: bool
    """Whether different pairs can belong together; else their ids need not be sent."""
    gather_dtype: torch.dtype | None = None
    """Of the features that are sent; None: as they are."""


@dataclass(frozen=True)
class StepRecord:
    """What one step left, on the device: nothing here has been waited for."""

    step: int
    lr: float
    loss: Tensor
    """This rank's part."""
    shared: Tensor
    """Rows of this rank that have more than one positive."""
    finite: Tensor
    """Rows of this rank whose features were finite."""
    scale: Tensor
    norm: Tensor
    skipped: Tensor
    """Whether the gradients were not finite and the weights stayed as they were; the same on all ranks."""


def freeze_fixed(model: nn.Module, loss: LossConfig) -> None:
    """Freezes what the loss does not see or train: DDP waits for the gradient of every parameter that wants one."""
    if loss.name == "clip" and getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)
    if loss.temperature is not None:
        model.logit_scale.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing is left to train: tune.rules freezes all but what the loss does not train.")


def train_mode(model: nn.Module, batch_norm: bool) -> None:
    """Training mode, but for frozen towers, and for BatchNorm unless asked: its statistics depend on the cut."""
    model.train()
    for tower in TOWERS:
        if is_frozen(model, tower):
            for part in tower_modules(model, tower):
                part.eval()
    for child in model.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.train(batch_norm and any(parameter.requires_grad for parameter in child.parameters()))


class ContrastiveModule(pl.LightningModule):
    def __init__(self, model: nn.Module, towers: Towers, loss: Loss, optim: OptimConfig, plan: Plan):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.towers, self.loss, self.optim, self.plan = model, towers, loss, optim, plan
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step = 0  # completed steps; Lightning's global_step counts optimizer.step(), not what the data are at
        self.record: StepRecord | None = None
        self.average: Average | None = None
        self.saved_average: dict[str, Tensor] = {}  # of the state that is gone on from

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim, self.plan.lr, self.plan.multipliers)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_train_start(self) -> None:
        self.train_mode()
        for optimizer in self.trainer.optimizers:
            set_options(optimizer, self.optim, self.plan.lr)
        if self.plan.ema is not None:
            self.average = Average(self.model, self.plan.ema, self.plan.train_batch_norm, self.saved_average)

    def train_mode(self) -> None:
        train_mode(self.model, self.plan.train_batch_norm)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert isinstance(optimizer, LightningOptimizer)
        lr = self._set_lr(optimizer)
        optimizer.zero_grad()
        statistics = [(buffer, buffer.clone()) for buffer in self._statistics()]
        gradients = contrastive_backward(
            self.towers,
            self.logit_scale,
            getattr(self.model, "logit_bias", None),
            batch,
            loss=self.loss,
            with_ids=self.plan.with_ids,
            gather_dtype=self.plan.gather_dtype,
            batch_size=self.plan.batch_size,
            micro_batch=self.plan.micro_batch,
            seed=(self.plan.seed, self.step),
            backward=self.manual_backward,
            no_sync=self._no_sync,
        )
        norm = self._clip(self.optim.max_norm)
        skipped = ~torch.isfinite(norm)  # alike on all ranks, because DDP has summed the gradients
        self._step(optimizer, skipped)
        for buffer, before in statistics:
            buffer.copy_(torch.where(skipped, before, buffer))
        if self.plan.clamp_scale and self.logit_scale.requires_grad:
            self.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        if self.average is not None:
            self.average.update(skipped)
        self.step += 1
        left = gradients.loss, gradients.shared, gradients.finite
        self.record = StepRecord(self.step, lr, *left, self.logit_scale.detach().exp(), norm, skipped)

    def _step(self, optimizer: LightningOptimizer, skipped: Tensor) -> None:
        """A step of the optimizer, which leaves weights and its own state alone where `skipped` says so.

        With a scaler (fp16) Lightning finds the same by the scaler's own look at the gradients.
        """
        if skips_by_itself(optimizer.optimizer):
            optimizer.optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
        elif self._scaler() is None and bool(skipped):  # the others decide on the host, which waits for the device
            return
        optimizer.step()

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _statistics(self) -> list[Tensor]:
        """Buffers that a forward pass changes: the statistics of BatchNorm where they are trained."""
        return list(self.model.buffers()) if self.plan.train_batch_norm else []

    @property
    def logit_scale(self) -> nn.Parameter:
        scale = self.model.logit_scale
        assert isinstance(scale, nn.Parameter)
        return scale

    def _set_lr(self, optimizer) -> float:
        plan = self.plan
        lr = lr_at(self.step, plan.num_steps, plan.lr, plan.warmup_steps, self.optim.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        return lr

    def _no_sync(self) -> AbstractContextManager[None]:
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _clip(self, max_norm: float) -> Tensor:
        """Scales the gradients to a norm of at most `max_norm`; returns the norm before.

        Lightning unscales fp16 gradients only inside optimizer.step, so the loss scale is divided out here; a norm
        that is not finite makes the gradients so too, and the scaler skips the step.
        """
        scaler = self._scaler()
        norm = gradient_norm(self.trained)
        if scaler is not None:
            norm = norm / scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device
        nn.utils.clip_grads_with_norm_(self.trained, max_norm, norm)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """Inside it the model has the weights that are validated: the averages, where there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """The weights to use under open_clip's names; beside averages those that training goes on from."""
        checkpoint["state_dict"] = self.model.state_dict()
        if self.average is not None:
            names = self.average.values.keys()
            checkpoint["raw_state_dict"] = {name: checkpoint["state_dict"][name] for name in names}
            checkpoint["state_dict"] |= self.average.values
        groups = parameter_groups(self.model, self.optim, self.plan.multipliers)
        checkpoint.setdefault("clipft", {})
        checkpoint["clipft"] |= {"step": self.step, "trained_by": trained_by(self.optim, groups)}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        weights, raw = checkpoint["state_dict"], checkpoint.get("raw_state_dict", {})
        self.saved_average = {name: weights[name] for name in raw}
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in (weights | raw).items()}
        self.step = checkpoint["clipft"]["step"]
        # The state of a run that was at its end, and goes on under more steps: Lightning would take it for done.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
