"""Expected attention: what the queries to come are likely to attend to, from the statistics of those that came."""

import copy

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sketchkv.cache import text_config
from sketchkv.checks import whole
from sketchkv.policies import Policy


class ExpectedAttention(Policy):
    """Keeps what a query drawn from a normal distribution would attend to, times the norm of the value (Devoto et al. 2025,
    "Expected Attention", arXiv 2510.00636).

    The published method chooses once, at the end of a prompt, from mean and covariance of the prompt's queries before their
    rotation, turned by the average rotation of the next `future` positions. Here the rule is applied at every eviction, to
    the queries of all tokens seen. For that a layer holds sums and products of its queries all the time: `head_dim *
    (head_dim + 1)` float32 numbers per query head, which count as memory and do not shrink with the cap.

    config: the model's configuration (or the model), with rotary embeddings as in Llama, or none.
    future: positions whose rotations are averaged.
    outliers: tokens at the start of a text, such as sinks, that are left out of the statistics and of the softmax.
    Raises ValueError for other rotations, and where keys are stored in turned coordinates (`bits` below 16).
    """

    recordable = False

    def __init__(self, config, future=512, outliers=4):
        config = text_config(config)
        self.future, self.outliers = whole("future", future, 1), whole("outliers", outliers, 0)
        self.heads, self.frequencies = config.num_attention_heads, None
        if getattr(config, "rope_parameters", None):
            if "full_attention" in config.rope_parameters:  # one rotation per kind of layer
                config = copy.copy(config)
                config.rope_parameters = config.rope_parameters["full_attention"]
            rotary = LlamaRotaryEmbedding(config)
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            if rotary.attention_scaling != 1 or 2 * len(rotary.inv_freq) != width:
                raise ValueError("expected attention is for rotations of whole heads that scale no logits")
            self.frequencies = rotary.inv_freq.float()

    def allocate(self, slots):
        if getattr(slots.codec, "rotates", False):
            raise ValueError("expected attention needs keys as the model has them: use bits=16 or None")
        batch, width, device = slots.shape[0], slots.widths[0], slots.device
        self.count = torch.zeros(batch, 1, 1, device=device)
        self.total = torch.zeros(batch, self.heads, width, device=device)
        self.products = torch.zeros(batch, self.heads, width, width, device=device)
        self.frequencies = None if self.frequencies is None else self.frequencies.to(device)

    def reset(self, slots):
        for tensor in self.tensors():
            tensor.zero_()

    def tensors(self):
        return [self.count, self.total, self.products]

    def query(self, slots, query):
        positions = slots["positions"][:, 0, -query.shape[2] :]
        counts = (positions >= self.outliers).float()[:, None, :, None]
        plain = self._turned(query.float(), -positions.float()[:, None]) * counts
        self.count += counts.sum(2)
        self.total += plain.sum(2)
        self.products += plain.transpose(-1, -2) @ plain

    def _turned(self, x, positions):
        """Vectors `[..., n, width]` turned as the model turns those at `positions` `[..., n]`."""
        if self.frequencies is None:
            return x
        angle = positions[..., None] * self.frequencies
        return self._rotation(x, angle.cos(), angle.sin())

    @staticmethod
    def _rotation(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def statistics(self, seen):
        """Mean `[batch, num_heads, width]` and covariance of the queries to come, after `seen` tokens."""
        mean = self.total / self.count.clamp(min=1)
        covariance = self.products / self.count.clamp(min=1)[..., None] - mean[..., None] * mean[..., None, :]
        if self.frequencies is None:
            return mean, covariance
        ahead = seen + torch.arange(self.future, device=mean.device)
        angle = ahead.float()[:, None] * self.frequencies
        turn = [angle.cos().mean(0), angle.sin().mean(0)]
        halfway = self._rotation(covariance, *turn).transpose(-1, -2)
        return self._rotation(mean, *turn), self._rotation(halfway, *turn)

    def score(self, slots, seen):
        mean, covariance = (x.unflatten(1, (slots.shape[1], -1)) for x in self.statistics(seen))
        keys = slots["keys"].float()[:, :, None]
        scale = keys.shape[-1] ** -0.5
        spread = ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
        logits = (keys @ mean[..., None]).squeeze(-1) * scale + spread
        beside = slots["positions"] < self.outliers
        attention = logits.masked_fill(beside[:, :, None], torch.finfo(logits.dtype).min).softmax(-1).mean(2)
        return attention * slots["values"].float().norm(dim=-1)
