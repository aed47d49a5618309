"""The edits `none`, `direction` and `measured`: scale the component of a reward's text embedding along a direction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from longalign.directions.file import Direction, load_direction
from longalign.edits.base import Edit, EditedText
from longalign.edits.config import DirectionConfig, MeasuredConfig, NoEditConfig
from longalign.functional import preference
from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime


class DirectionEdit(Edit):
    """Edit that scales the component of a text embedding ``C_P`` along a unit vector ``D`` by ``omega``.

    The edited embedding is ``C_P - (1 - omega) (C_P . D) D``. ``D`` is the common direction of text embeddings
    (LongAlign, arXiv 2410.11817, section 4), or a direction from a file. For a direction from a file, ``C_P . D`` is
    logged as ``measured_text``, and ``C_X . D`` with the image embedding ``C_X`` as ``measured_image``. The product of
    these two is the part of the original score that is scaled.

    Args:
        omega: factor of the component; 0 removes it, 1 keeps the original score.
        direction: a direction from a file; None for the common direction.
    """

    vector: Tensor | None

    def __init__(self, *, omega: float, direction: Direction | None):
        super().__init__()
        self.omega, self.direction = omega, direction
        self.needs_direction = direction is None and omega != 1
        # not persistent: it is reloaded from its file
        vector = None if direction is None else F.normalize(direction.vector.float(), dim=0)
        self.register_buffer("vector", vector, persistent=False)

    @classmethod
    def from_config(cls, config: NoEditConfig | DirectionConfig | MeasuredConfig, runtime: Runtime) -> DirectionEdit:
        direction = None if config.file is None else load_direction(config.file)
        return cls(omega=config.omega, direction=direction).to(runtime.device)

    def check_reward(self, reward: EmbeddingReward, config: PartConfig | None = None) -> None:
        if self.direction is not None:
            self.direction.vector_for(reward, config)

    def forward(
        self, text: Tensor, prompts: Sequence[str], reward: EmbeddingReward, direction: Tensor | None
    ) -> EditedText:
        if self.vector is None:
            return EditedText(text if direction is None else preference.reweight(text, direction, self.omega))
        vector = self.vector.to(text.device)
        edited = preference.reweight(text, vector, self.omega)
        return EditedText(edited, {"measured_image": vector}, {"measured_text": preference.eta(text, vector)})
