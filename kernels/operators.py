"""Functions of tensors as torch operators, which autograd, ``torch.compile`` and ``opcheck`` see.

``torch.library.custom_op`` does the same, but imports torch's compiler at the first call, which takes every process
that encodes anything some 3 seconds.
"""

import torch

NAMESPACE = "saekit"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """An operator of the namespace; it returns new tensors and writes to none that it gets."""

    def __init__(self, name, function):
        self.name = f"{NAMESPACE}::{name}"
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self._call = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._backward, self._setup = self._none, lambda ctx, inputs, output: None
        torch.library.register_autograd(
            self.name,
            lambda ctx, *gradients: self._backward(ctx, *gradients),
            setup_context=lambda ctx, inputs, output: self._setup(ctx, inputs, output),
            lib=_library,
        )

    def __call__(self, *args):
        return self._call(*args)

    def register_fake(self, function):
        """Shapes and types of what it returns, without values."""
        return torch.library.register_fake(self.name, function, lib=_library)

    def register_autograd(self, backward, setup_context):
        """Its gradients."""
        self._backward, self._setup = backward, setup_context

    def _none(self, ctx, *gradients):
        raise RuntimeError(f"{self.name} has no gradient")


def operator(name):
    """Decorator: the function as ``torch.ops.saekit.<name>``."""
    return lambda function: Operator(name, function)
