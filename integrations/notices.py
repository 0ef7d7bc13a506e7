"""Every warning of the attachment. Each is given at most once per training, and says why PRe cannot
do its work and how to mend that."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

WARNINGS = {
    # Warnings about a single forward.
    "image tokens without images": (
        "input_ids has {count} image tokens, but the forward got none of {known} (it got {got}), "
        "so they are taken for text and L_PRe has no term; if images came in another argument, "
        "pass mask_fn= to apply_pre"
    ),
    "images without image tokens": (
        "the forward got {got}, but input_ids has none of the image tokens {tokens} that the "
        "model's config names, and had none in the {count} earlier forwards with images, so L_PRe "
        "has no term; set image_token_id in model.config to the id that stands for images in "
        "input_ids, or pass mask_fn= to apply_pre"
    ),
    "attention mask of another form": (
        "attention_mask is {what}, a form that PRe cannot read, so all visual tokens count, those "
        "of padding and dummy images too; PRe can read (batch, tokens), (batch or 1, heads or 1, "
        "tokens, tokens) of bool or float, and dicts of such masks; pass mask_fn= to apply_pre if "
        "some must not count"
    ),
    "cut images": (
        "processes share each sequence, and {option} takes the parts of an image that they share "
        "for images of their own, so L_PRe is not that of whole sequences; leave this option out, "
        "or let every image lie in one part"
    ),
    "called inside": (
        "the text model ran in training outside a call of {model}, to which PRe is attached, so "
        "L_PRe is not added; attach to the module that is called"
    ),
    "not called": (
        "the optimizer trains {model}, to which PRe is attached, but the last steps had no call of "
        "it, so L_PRe has no term; call it as model(...), because model.forward(...) runs no hook, "
        "or attach to the module that is called"
    ),
    "nothing below trains": (
        "no hidden state that enters L_PRe at layer {layers} requires grad, so the model does not "
        "learn from it, at most the head does: nothing at or below that layer is trained; train "
        "the projector or layers below, or choose a later layer"
    ),
    "frozen head": (
        "no parameter of `pre_head` requires grad, so the head keeps its weights; if that is not "
        "intended, call handle.head.requires_grad_(True), or call apply_pre after freezing the "
        "model; if it is, use apply_pre(head_trainable=False)"
    ),
    # Warnings about a training, in any loop.
    "lost": (
        "the last {count} L_PRe were computed but never back-propagated, so the head does not "
        "train: the loss that is back-propagated is not output.loss; {advice}"
    ),
    "eval mode": (
        "the last {count} backward passes were of forwards in eval mode, which have no L_PRe, so "
        "the head does not train; call model.train() before training"
    ),
    "no labels": (
        "the last {count} backward passes were of training forwards without `{labels}`, which have "
        "no L_PRe, so the head does not train; under a transformers.Trainer use patch_trainer(); "
        "in a loop of your own give the model its labels, name their argument with "
        "apply_pre(labels=...), or pass labels=None and add handle.loss() to the loss"
    ),
    "no visual tokens": (
        "none of the {count} forwards so far had a visual token that counts, so the head does not "
        "train; check that the batches have images and that they are not masked"
    ),
    "optimizer without the head": (
        "the optimizer ({optimizer}) steps the model but not `pre_head`, so the head never trains; "
        "make it after apply_pre from all parameters that require grad, or add "
        "handle.param_groups()"
    ),
    "optimizer without the model": (
        "the optimizer ({optimizer}) steps only `pre_head`, while other parameters of the model "
        "require grad; handle.param_groups() has only the head's groups, so add the model's too"
    ),
    # Warnings about a transformers.Trainer under patch_trainer.
    "no handle": (
        "this training has no PRe: patch_trainer() is in use, but the model of {trainer}, a "
        "{model}, has no handle; call apply_pre(trainer.model) before train(), or inside "
        "model_init if there is one"
    ),
    "handle inside": (
        "the handle is on a {inner} inside the {model} that is trained, so what is saved has the "
        "keys of `pre_head`; call apply_pre on the model that the Trainer is given"
    ),
    "not counted": (
        "the batches of {trainer} cannot be counted before their forwards ({reason}), so each "
        "micro-batch adds the mean over its own visual tokens, not its part of the step's mean"
    ),
    "counted otherwise": (
        "{counted} visual tokens (or images) were counted ahead in the batches since the last log, "
        "and the forwards had {seen}: the model's inputs are made from the batch later, or it runs "
        "more than once; from now on each micro-batch adds the mean over its own visual tokens, as "
        "those with more of them did"
    ),
    "centered by micro-batch": (
        'a step has {count} micro-batches, and anchor_norm="center" subtracts the mean anchor of '
        "each of them (over all processes), not that of the step, because the anchors of later "
        "micro-batches do not exist yet; fewer and larger micro-batches make the two more alike"
    ),
    "training_step not reached": (
        "a step of {trainer} did not come through Trainer.training_step, which was replaced during "
        "the training or is not called, so each forward with labels adds its own mean to "
        "output.loss; a loss of the trainer's own would leave it out"
    ),
    "get_batch_samples not reached": (
        "micro-batches of {trainer} did not come from Trainer.get_batch_samples, so their visual "
        "tokens are not counted over the step; each adds the mean over its own"
    ),
    "no accelerator.backward": (
        "L_PRe was computed but {trainer}.training_step never called accelerator.backward, so this "
        "micro-batch trains without it; from now on it is added to output.loss, each forward's own "
        "mean"
    ),
    "optimizer of its own": ("head_lr and head_weight_decay do nothing with {optimizer}, {why}"),
    "optimizer given": (
        "the optimizer given to the Trainer lacks parameters of the head, so they are not trained; "
        "make it after apply_pre, with handle.param_groups()"
    ),
    "optimizer made before": (
        "the optimizer was made before the training, without head_lr and head_weight_decay, which "
        "do nothing in it; let train() make it, or give the Trainer one with handle.param_groups()"
    ),
    "optimizer refuses": (
        "{optimizer} does not take parameters like {names} of the head ({error}), so these keep "
        "their values; give the Trainer an optimizer that takes them, or use apply_pre(bias=False)"
    ),
    "head recast": (
        "the head's {names} were cast to {dtype} after apply_pre; they were cast back to {wanted}"
    ),
    "no head in the checkpoint": (
        "{folder} holds no head, so it starts from its initial weights ({error})"
    ),
    "optimizer without the head's state": (
        "the optimizer's state in {folder} is of a training without PRe, or with a frozen "
        "head; the state of the other parameters was loaded, that of the head starts fresh"
    ),
    "head's state left out": (
        "the optimizer's state in {folder} is of a training with PRe; the state of the other "
        "parameters was loaded, that of the head was left out"
    ),
    # A warning for loops without a Trainer.
    "no progress": (
        "λ has a schedule, but handle.progress was never set, so λ stays {weight:g}; set "
        "handle.progress = (step + 0.5) / steps before each step, or use patch_trainer()"
    ),
    # Warnings of the launcher, which prints them to stderr.
    "launched own loop": (
        "the first optimizer step was outside of a transformers.Trainer, and the launcher attaches "
        "only to models of such trainers, so this training has no PRe; in a loop of your own write "
        "`apply_pre(model)` before the optimizer is made, which needs no launcher"
    ),
    "launched no images": (
        "{trainer} trains {model}, which is not a vision-language model according to its config "
        "(it has neither vision_config nor image_token_id), so this training has no PRe; if the "
        "model sees images, give the launcher --set mask_fn=module:function, which finds its "
        "visual tokens (see apply_pre)"
    ),
    "launched unseen": (
        "{trainer} trains {model} without PRe, because Trainer.__init__ and Trainer.train, with "
        "which the launcher attaches, were replaced after it was started; write `apply_pre(model)` "
        "before the Trainer is made"
    ),
    "launched without terms": (
        "{model} was trained, but no batch had a term of PRe; check that batches have visual tokens"
    ),
    "launched nothing": (
        "nothing was trained with PRe: in this process the script trained no vision-language model "
        "with a transformers.Trainer; if it trained one in processes that the launcher cannot "
        "follow ({started}), start those with `{line}`"
    ),
}


class Notices:
    """The warnings of one handle or patch. A warning that was given is not repeated until
    `forget()`."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.turns: Counter[str] = Counter()

    def warn(self, name: str, **values: Any) -> None:
        """Give the warning `name` of WARNINGS, filled in with `values`, unless it was given
        already."""
        if name not in self.given:
            self.given.add(name)
            warnings.warn(f"PRe: {WARNINGS[name].format(**values)}", stacklevel=3)

    def settle(self, name: str) -> None:
        """Do not give the warning `name` in this training."""
        self.given.add(name)

    def turn(self, name: str) -> int:
        """Count a check (or a find) of the cause of the warning `name`, and return the count in
        this training, from 1."""
        self.turns[name] += 1
        return self.turns[name]

    def forget(self) -> None:
        """Begin a new training: every warning may be given again."""
        self.given.clear()
        self.turns.clear()
