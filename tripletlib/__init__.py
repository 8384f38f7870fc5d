"""Deep metric learning with triplet networks, small enough to read.

The chapters in ``notebooks/`` derive what this package holds; import it to use it.
"""

from tripletlib.augmentation import jitter, jitter_colours
from tripletlib.data import (
    ImageFolderDataset,
    load_emoji,
    load_fashion_mnist,
    load_image,
    load_libraries,
    load_mnist,
    load_olivetti,
)
from tripletlib.distances import pairwise_distances
from tripletlib.estimator import TripletEmbedder
from tripletlib.explorer import Explorer, explore
from tripletlib.losses import (
    ContrastiveLoss,
    DistanceRatioLoss,
    TripletLoss,
    batch_all_triplet_loss,
)
from tripletlib.neighbours import KNNClassifier
from tripletlib.networks import EmbeddingNet, HofferAilonNet, ResidualNet, TripletNet
from tripletlib.runs import load_or_fit
from tripletlib.sampling import BalancedBatchSampler, draw_triplets
from tripletlib.scores import (
    Score,
    knn_accuracy,
    list_recall_at_k,
    mean_average_precision_at_r,
    ndcg_at_k,
    r_precision,
    recall_at_k,
)
from tripletlib.search import SearchIndex
from tripletlib.training import History, embed, fit
from tripletlib.triplets import describe_triplets, mine_triplets
from tripletlib.verification import VerificationReport, pair_distances, verification_report

__all__ = [
    "BalancedBatchSampler",
    "ContrastiveLoss",
    "DistanceRatioLoss",
    "EmbeddingNet",
    "Explorer",
    "History",
    "HofferAilonNet",
    "ImageFolderDataset",
    "KNNClassifier",
    "ResidualNet",
    "Score",
    "SearchIndex",
    "TripletEmbedder",
    "TripletLoss",
    "TripletNet",
    "VerificationReport",
    "batch_all_triplet_loss",
    "describe_triplets",
    "draw_triplets",
    "embed",
    "explore",
    "fit",
    "jitter",
    "jitter_colours",
    "knn_accuracy",
    "list_recall_at_k",
    "load_emoji",
    "load_fashion_mnist",
    "load_image",
    "load_libraries",
    "load_mnist",
    "load_olivetti",
    "load_or_fit",
    "mean_average_precision_at_r",
    "mine_triplets",
    "ndcg_at_k",
    "pair_distances",
    "pairwise_distances",
    "r_precision",
    "recall_at_k",
    "verification_report",
]
