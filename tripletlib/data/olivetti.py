"""The Olivetti faces, through scikit-learn."""

from __future__ import annotations

import io
import os
import socket
import warnings
from contextlib import redirect_stdout

import torch
from torch import Tensor


def load_olivetti(root: str | os.PathLike | None = None) -> tuple[Tensor, Tensor]:
    """Load the Olivetti faces, ten photographs of each of 40 people, standardised one by one.

    Each image is shifted and scaled to mean 0 and standard deviation 1. That takes off much of the
    lighting, and nothing about one person gets into the images of another.

    Parameters
    ----------
    root : path, optional
        Where scikit-learn keeps the data, or is to download it to; by default its own folder
        (``scikit_learn_data`` in the home folder, or what ``SCIKIT_LEARN_DATA`` names).

    Returns
    -------
    images : Tensor, float32, shape (400, 1, 64, 64)
        Grey images.
    labels : Tensor, int64, shape (400,)
        The person, 0 to 39.

    Raises
    ------
    RuntimeError
        If the data is not there and cannot be downloaded, which is tried for some seconds only, or
        if it is damaged.

    References
    ----------
    F. S. Samaria, A. C. Harter, "Parameterisation of a stochastic model for human face
    identification", 1994; photographs by AT&T Laboratories Cambridge.
    """
    from sklearn.datasets import fetch_olivetti_faces

    root = None if root is None else os.path.expanduser(root)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; a network that drops packets would keep us for minutes
    try:
        # It prints a path, and warns of its second attempt.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            faces = fetch_olivetti_faces(data_home=root, n_retries=1, delay=0.1)
    except Exception as error:  # a network, a proxy, a disk and a file fail in ways of their own
        raise RuntimeError(
            f"could not load the Olivetti faces ({type(error).__name__}: {error}). Check that "
            "there is a network to download them, or name in root= the folder that holds "
            "scikit-learn's file of them; if that file is damaged, delete it"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.from_numpy(faces.images).to(torch.float32).unsqueeze(1)
    deviation, mean = torch.std_mean(images, dim=(2, 3), correction=0, keepdim=True)
    # An image of one grey has no deviation, and becomes 0.
    return (images - mean) / deviation.clamp(min=1e-6), torch.from_numpy(faces.target).long()
