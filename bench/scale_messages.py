"""The messages that PRe adds to an optimizer step, and the model's own, as a process sends them in
rings. Nothing here is measured; see scale_costs.py."""

from __future__ import annotations

from typing import NamedTuple

from .scale_costs import Rates, Training


class Message(NamedTuple):
    """A collective of a step: how often it runs, the bytes of the whole tensor, over how many
    processes, the bytes that each sends for each byte of it, and whether it stays in a node."""

    name: str
    calls: int
    size: float
    processes: int
    times: int
    inside: bool

    @property
    def sent(self) -> float:
        """The bytes that a process sends in a step."""
        return self.calls * self.times * self.size * (self.processes - 1) / self.processes


class Small(NamedTuple):
    """A message of a few numbers."""

    what: str
    how_often: str
    size: int


def of_heads(training: Training) -> list[Message]:
    """Return the messages with the heads' parameters and gradients."""
    elements = training.heads * training.head_parameters
    own = training.own_group or training.strategy == "zero3"
    # The forward gathers, and so does the backward of a group that was split again in between.
    gathers = 2 if own else 1
    if own and training.loss != "cosine":
        # Another call of the head computes the cosines for the log.
        gathers += 1
    trained = 0 if training.frozen_head else elements
    return _collectives(training, elements, trained, gathers)


def of_model(training: Training) -> list[Message]:
    """Return those of the model, whose layers are split one by one. Those of tensor parallelism are
    not in it."""
    elements = training.model.parameters // training.tensor
    return _collectives(training, elements, training.own_parameters, 2)


def _collectives(training: Training, elements: int, trained: int, gathers: int) -> list[Message]:
    steps = training.micro_batches
    weights = elements * training.weight_bytes
    gradients = trained * training.gradient_bytes
    replicas = training.replicas
    inside = training.ranks <= training.node
    strategy = training.strategy

    def message(name: str, calls: int, size: float, times: int = 1) -> Message:
        return Message(name, calls, size, replicas, times, inside)

    if strategy == "ddp":
        found = [message("all-reduce", 1, gradients, 2)]
    elif strategy in ("zero1", "zero2"):
        # Only what is trained has changed and is gathered.
        reduce = message("all-reduce", 1 if strategy == "zero1" else steps, gradients, 2)
        found = [reduce, message("all-gather", 1, trained * training.weight_bytes)]
    elif not training.hybrid:
        found = [
            message("all-gather", gathers * steps, weights),
            message("reduce-scatter", steps, gradients),
        ]
    else:
        shards = training.shards
        nodes = replicas // shards
        found = [
            Message("all-gather", gathers * steps, weights, shards, 1, True),
            Message("reduce-scatter", steps, gradients, shards, 1, True),
            Message("all-reduce", steps, gradients / shards, nodes, 2, False),
        ]
    return [one for one in found if one.sent]


def seconds(training: Training, messages: list[Message], rates: Rates) -> float:
    """Predict the time of messages that wait for each other, at the rates of the links."""
    total = 0.0
    for message in messages:
        rate = rates.node
        if not message.inside:
            # Rings beside each other use the network card of each GPU of the node that takes part.
            # After a reduce-scatter each GPU has a part of its own for the network.
            cards = 1 if training.hybrid else training.node // training.tensor
            rate = min(rates.node, cards * rates.network)
        total += message.sent / rate
    return total


def small(heads: int) -> list[Small]:
    """Return the messages of a few numbers of a training with this many heads."""
    # The sums of a log: 4, the loss of each head, 3 of the model's own losses, 2 of those that were
    # back-propagated, 2 of the gradient's norm, and 6 of the Trainer's.
    log = 4 + heads + 3 + 2 + 2 + 6
    return [
        Small("`patch_trainer`: visual tokens of the step", "once for each optimizer step", 8),
        Small("`patch_trainer`: sums for the log", "once for each log", 8 * log),
        Small("`group=`: visual tokens of a forward", "once for each forward", 4),
        Small(
            "`group=`: share of the step's labels, if the model divides its loss by them",
            "once for each forward",
            4,
        ),
    ]
