"""A linear layer of a block: its name in files, and where its weight lies in a parameter of the model.

Mostly the parameter is the weight. Some classes hold it transposed. Experts of a layer share one parameter, which is
[E, rows, columns] or [E, columns, rows]; the rows of gate and up in it are stacked, or alternate.
"""

import dataclasses

import torch

from astro.model.clipped_rounding import InputClips

__all__ = ["LinearLayer"]


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A linear layer inside a block.

    Attributes:
        name: Name of the layer in the model; a layer of an expert is named as its packed tensors are.
        key: Name of the checkpoint tensor that holds the weight, alone or with others.
        rows: Output size.
        columns: Input size.
        stem: Checkpoint name, without an ending, under which the packed tensors are stored.
        parameter: Name of the model's parameter that holds the weight.
        expert: Index of the expert that the layer belongs to; None outside experts.
        first: Index of the layer's first row in the parameter.
        step: Distance in the parameter from one row of the layer to its next.
        transposed: Whether the parameter holds columns before rows.
        bias: Name of the checkpoint tensor that holds the biases of all experts, in the order of the parameter; None
            where there is none, and outside experts, where a bias is a tensor of its own.
        joint: Text between the stem and the ending of the name of a packed tensor.
        served_as: Names under which servers look up how the layer is quantized, where these are others than `name`.
        turned: Whether the checkpoint tensor has the last two dimensions of the parameter exchanged.
        stored_first: Index of the layer's first row in the checkpoint tensor, where this holds the rows of several
            parameters; None where it holds one parameter.
        clips: Learned grid of the layer's inputs; None where it has none, or none is used.
    """

    name: str
    key: str
    rows: int
    columns: int
    stem: str
    parameter: str
    expert: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False
    bias: str | None = None
    joint: str = "."
    served_as: tuple[str, ...] = ()
    turned: bool = False
    stored_first: int | None = None
    clips: InputClips | None = None

    @classmethod
    def plain(cls, name: str, key: str, rows: int, columns: int, transposed: bool = False) -> "LinearLayer":
        """Describe a layer whose weight is a whole parameter, and a whole tensor in the checkpoint.

        Args:
            name: Name of the layer in the model.
            key: Name of the checkpoint tensor that holds the weight.
            rows: Output size.
            columns: Input size.
            transposed: Whether the parameter holds columns before rows.
        """
        stem = key.removesuffix(".weight")
        return cls(name, key, rows, columns, stem, f"{name}.weight", transposed=transposed)

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the weight [rows, columns] in the parameter, without a copy.

        Args:
            parameter: The model's parameter, or a tensor with the same sizes.
        """
        return self.view_in_expert(parameter if self.expert is None else parameter[self.expert])

    def view_in_expert(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the weight [rows, columns] in the matrix of its expert, or in the whole parameter outside experts.

        Args:
            matrix: The matrix, or one of the same sizes.
        """
        return (matrix.T if self.transposed else matrix)[self._rows]

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the weight [rows, columns] in a checkpoint tensor, without a copy.

        Args:
            tensor: The checkpoint tensor `key`.
        """
        if self.stored_first is not None:
            return tensor[self.stored_first : self.stored_first + self.rows]
        alone = self.expert is not None and tensor.ndim == 2
        return tensor if alone else self.view(tensor.transpose(-1, -2) if self.turned else tensor)

    def stored_bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the bias [rows] in a checkpoint tensor, without a copy.

        Args:
            tensor: The checkpoint tensor `bias`, [E, rows of all layers in the parameter].
        """
        return tensor[self.expert][self._rows]

    @property
    def is_fused(self) -> bool:
        """Whether the checkpoint tensor `key` holds the weights of all experts."""
        return self.expert is not None and self.key != f"{self.stem}.weight"

    @property
    def config_names(self) -> tuple[str, ...]:
        """The names by which the result's config.json tells how the layer is quantized, or that it is not."""
        return self.served_as or (self.name,)

    @property
    def _rows(self) -> slice:
        return slice(self.first, self.first + self.rows * self.step, self.step)
