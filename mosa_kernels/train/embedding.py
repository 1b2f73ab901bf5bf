"""The features of trained models in two dimensions (arXiv 2312.02923, Figure 4), and how well classes stand apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosa_kernels.train.evaluate import predict
from mosa_kernels.train.plots import save_figure

NEIGHBOURS = 20
PERPLEXITY = 30.0


class PreLogits(nn.Module):
    """A timm model up to its classifier: images [B, 3, H, W] -> features [B, d]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features


@dataclass(frozen=True)
class Embedding:
    """One model's picture.

    Attributes:
        title: over the panel.
        points: float [n, 2].
        labels: int64 [n].
        neighbours: percent of the images whose nearest 20 others, by cosine of the features, mostly share their class.
        silhouette: of the classes in the features, -1 to 1.
    """

    title: str
    points: Tensor
    labels: Tensor
    neighbours: float
    silhouette: float


def embed(model: nn.Module, loader: Iterable[Any], title: str, *, images: int, classes: int, seed: int) -> Embedding:
    """Runs a model over a data set and places its features by t-SNE.

    Args:
        model: of timm, trained.
        loader: of (images, labels).
        title: over the panel.
        images: how many to draw at most, chosen at random.
        classes: the first so many of them.
        seed: of the choice and of t-SNE.

    Raises:
        ValueError: too few images or classes to place.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    found = predict(PreLogits(model), loader)
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[found.labels[order] < classes][:images]
    features, labels = found.logits[chosen], found.labels[chosen]
    if len(labels) <= NEIGHBOURS or len(labels.unique()) < 2:
        raise ValueError(
            f"images: expected more than {NEIGHBOURS}, of two classes at least, got {len(labels)} of "
            f"{len(labels.unique())}"
        )
    perplexity = min(PERPLEXITY, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.numpy())
    return Embedding(
        title,
        torch.from_numpy(points),
        labels,
        neighbour_accuracy(features, labels),
        float(silhouette_score(features.numpy(), labels.numpy())),
    )


def neighbour_accuracy(features: Tensor, labels: Tensor) -> float:
    """Percent of the rows whose nearest 20 others, by cosine, vote for their label; ties go to the smaller label.

    Args:
        features: [n, d].
        labels: int64 [n].
    """
    unit = nn.functional.normalize(features.double(), dim=1)
    likeness = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = labels[likeness.topk(min(NEIGHBOURS, len(labels) - 1)).indices]  # [n, 20]
    votes = nn.functional.one_hot(nearest, int(labels.max()) + 1).sum(1)
    return 100 * (votes.argmax(1) == labels).double().mean().item()


def draw_embeddings(embeddings: Sequence[Embedding], path: Path) -> None:
    """Writes a PNG with a panel a model, colours by class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(embeddings), 4)
    rows = -(-len(embeddings) // columns)
    figure: Any = Figure(figsize=(3.6 * columns, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, one in zip(panels, embeddings, strict=False):
        colours = colormaps["tab10" if one.labels.max() < 10 else "gist_ncar"]
        panel.scatter(*one.points.T.numpy(), c=one.labels.numpy(), cmap=colours, s=4, linewidths=0)
        panel.set_title(
            f"{one.title}\n{one.neighbours:.1f} % by 20 neighbours, silhouette {one.silhouette:.3f}", fontsize=9
        )
    for panel in figure.axes:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in figure.axes[len(embeddings) :]:
        panel.axis("off")
    save_figure(figure, path)
