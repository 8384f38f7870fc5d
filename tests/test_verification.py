import socket
import tracemalloc
import warnings
from fractions import Fraction
from urllib.error import URLError

import joblib
import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from devices import DEVICES, FAKE, FakeDevice, NoDouble
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm
from sklearn.metrics import auc, det_curve, roc_auc_score, roc_curve

import tripletlib.verification
from tripletlib import (
    BalancedBatchSampler,
    EmbeddingNet,
    VerificationReport,
    fit,
    load_olivetti,
    pair_distances,
    pairwise_distances,
    verification_report,
)

# Three same and two different pairs; by hand: accepting up to 0.2 accepts two of three same and no
# different pair; up to 0.3, one of two different; up to 0.4, all three same.
DISTANCES = np.array([0.4, 0.3, 0.1, 0.9, 0.2])
SAME = np.array([True, False, True, False, True])


def tied_pairs():
    """Few distances and many pairs, so that ties are the rule."""
    pair = st.tuples(st.integers(0, 6), st.booleans())
    pairs = st.lists(pair, min_size=2, max_size=40)
    both = pairs.filter(lambda drawn: len({same for _, same in drawn}) == 2)
    return both.map(
        lambda drawn: (
            np.array([distance / 4 for distance, _ in drawn], dtype=np.float32),
            np.array([same for _, same in drawn]),
        )
    )


def normal_pairs(same_pairs, different_pairs, apart=2.0, seed=0):
    """Distances of which every true rate is known."""
    generator = np.random.default_rng(seed)
    distances = generator.normal(size=same_pairs + different_pairs)
    same = np.arange(len(distances)) < same_pairs
    distances[~same] += apart
    return distances, same


def points(count, dimensions=5, classes=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return embeddings.to(dtype), torch.randint(classes, (count,), generator=generator)


def test_a_case_by_hand():
    report = verification_report(DISTANCES, SAME)
    assert (report.same_pairs, report.different_pairs) == (3, 2)
    # Of the six pairs of pairs only (0.4, 0.3) is in the wrong order.
    assert report.auc == pytest.approx(5 / 6)
    far, frr = report.at(0.3)
    assert (far, frr) == pytest.approx((1 / 2, 1 / 3))
    assert (far.queries, frr.queries) == (2, 3)
    # From 0.2 to 0.3 the curve goes from FAR 0 to 1/2 at FRR 1/3: it meets FAR = FRR at 1/3.
    assert report.equal_error_rate == pytest.approx(1 / 3)
    assert report.equal_error_threshold == 0.3
    assert report.tar_at_far(0.5) == 1.0
    assert report.tar_at_far(0.49) == pytest.approx(2 / 3)
    assert 0.4 < report.threshold_at_far(0.5) < 0.9
    np.testing.assert_allclose(report.roc.thresholds, [-np.inf, 0.1, 0.2, 0.3, 0.4, 0.9])
    np.testing.assert_allclose(report.roc.false_accept_rate, [0, 0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(report.roc.true_accept_rate, [0, 1 / 3, 2 / 3, 2 / 3, 1, 1])


def test_equal_error_rate_where_the_curve_jumps_over_equality():
    # At 1: FAR 0, FRR 1/2. At 2: FAR 1, FRR 0. The line between has FAR = FRR at 1/3.
    report = verification_report(np.array([1.0, 2.0, 2.0]), np.array([True, True, False]))
    assert report.equal_error_rate == pytest.approx(1 / 3)
    assert report.equal_error_threshold == 2.0


@given(tied_pairs())
def test_curve_and_area_equal_scikit_learn(pairs):
    distances, same = pairs
    report = verification_report(distances, same)
    far, tar, scores = roc_curve(same, -distances, drop_intermediate=False)
    np.testing.assert_allclose(report.roc.false_accept_rate, far)
    np.testing.assert_allclose(report.roc.true_accept_rate, tar)
    np.testing.assert_allclose(report.roc.thresholds, -scores)
    assert report.auc == pytest.approx(roc_auc_score(same, -distances))
    assert report.auc.low <= report.auc <= report.auc.high


@given(tied_pairs(), st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.29, 1 / 3, 0.5, 1.0]))
def test_tar_at_far_is_the_best_point_of_scikit_learns_curve(pairs, wanted):
    distances, same = pairs
    report = verification_report(distances, same)
    far, tar, _ = roc_curve(same, -distances, drop_intermediate=False)
    assert report.tar_at_far(wanted) == pytest.approx(tar[far <= wanted].max())
    threshold = report.threshold_at_far(wanted)
    assert report.at(threshold).false_accept_rate <= wanted
    if np.isfinite(threshold):  # the largest: the next number accepts too much
        above = float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
        assert report.at(above).false_accept_rate > wanted
        assert report.at(threshold).false_accept_rate == (distances[~same] <= threshold).mean()


@given(tied_pairs())
def test_equal_error_rate_is_where_the_curve_crosses(pairs):
    distances, same = pairs
    report = verification_report(distances, same)
    far, tar, _ = roc_curve(same, -distances, drop_intermediate=False)
    frr = 1 - tar
    after = int(np.argmax(far >= frr - 1e-12))
    along = np.linspace(0, 1, 10_001)  # the line of the crossing, in small steps
    on_line = far[after - 1] + along * (far[after] - far[after - 1])
    other = frr[after - 1] + along * (frr[after] - frr[after - 1])
    assert report.equal_error_rate == pytest.approx(
        on_line[np.abs(on_line - other).argmin()], abs=2e-4
    )
    assert report.equal_error_rate.low <= report.equal_error_rate <= report.equal_error_rate.high
    rates = report.at(report.equal_error_threshold)
    assert rates.false_accept_rate >= rates.false_reject_rate - 1e-12


@given(tied_pairs())
def test_errors_at_every_threshold_equal_scikit_learns_det_curve(pairs):
    distances, same = pairs
    report = verification_report(distances, same)
    for far, frr, score in zip(*det_curve(same, -distances), strict=True):
        rates = report.at(-score)
        assert rates == pytest.approx((far, frr))


def test_whole_far_is_not_lost_to_rounding():
    different = np.arange(100.0)
    distances = np.append(different, 28.5)
    report = verification_report(distances, np.append(np.zeros(100, bool), True))
    # 0.29 * 100 is 28.999999999999996: yet 29 false accepts of 100 are within a FAR of 0.29.
    assert report.tar_at_far(0.29) == 1.0
    assert report.tar_at_far(0.28) == 0.0


def test_perfect_separation_all_equal_and_all_reversed_are_finite():
    same = np.array([True, True, False, False])
    perfect = verification_report(np.array([0.0, 1.0, 2.0, 3.0]), same)
    assert (perfect.auc, perfect.equal_error_rate, perfect.tar_at_far(0)) == (1, 0, 1)
    assert perfect.equal_error_threshold == 1.0
    assert (perfect.auc.low, perfect.auc.high) == (1, 1)
    assert perfect.equal_error_rate.high > 0.5  # two pairs of a kind tell little
    equal = verification_report(np.ones(4), same)
    assert (equal.auc, equal.equal_error_rate, equal.tar_at_far(0.01)) == (0.5, 0.5, 0)
    assert equal.equal_error_threshold == 1.0
    assert equal.threshold_at_far(0.01) < 1.0
    reversed_ = verification_report(np.array([2.0, 3.0, 0.0, 1.0]), same)
    assert (reversed_.auc, reversed_.equal_error_rate, reversed_.tar_at_far(0.01)) == (0, 1, 0)
    for report in (perfect, equal, reversed_):
        assert np.isfinite(report.frame()[["value", "low", "high"]].to_numpy()).all()


def test_few_different_pairs_mean_no_false_accept_at_all():
    distances, same = normal_pairs(500, 999)
    report = verification_report(distances, same)
    assert report.tar_at_far(0.001) == (distances[same] < distances[~same].min()).mean()
    assert report.tar_at_far(0.001) == report.tar_at_far(0.0)
    distances, same = normal_pairs(500, 1000)
    report = verification_report(distances, same)
    assert report.tar_at_far(0.001) > report.tar_at_far(0.0)


def test_rates_have_clopper_and_pearsons_interval():
    distances, same = normal_pairs(400, 600)
    report = verification_report(distances, same)
    rejected = int((distances[same] > 1.2).sum())
    frr = report.at(1.2).false_reject_rate
    expected = beta.ppf([0.025, 0.975], [rejected, rejected + 1], [401 - rejected, 400 - rejected])
    assert (frr.low, frr.high) == pytest.approx(tuple(expected))
    tar = report.tar_at_far(0.01)
    accepted = int((distances[same] <= report.threshold_at_far(0.01)).sum())
    expected = beta.ppf([0.025, 0.975], [accepted, accepted + 1], [401 - accepted, 400 - accepted])
    assert (tar.low, tar.high) == pytest.approx(tuple(expected))


def test_interval_of_the_area_is_delongs():
    distances, same = normal_pairs(30, 50, apart=1.0)
    closer = (distances[same][:, None] < distances[~same]).astype(float)  # one by one; no ties here
    variance = closer.mean(axis=1).var(ddof=1) / 30 + closer.mean(axis=0).var(ddof=1) / 50
    report = verification_report(distances, same)
    half = norm.ppf(0.975) * np.sqrt(variance)
    assert report.auc.low == pytest.approx(closer.mean() - half)
    assert report.auc.high == pytest.approx(min(1, closer.mean() + half))


def test_intervals_hold_the_truth_as_often_as_they_say():
    true_auc, true_eer = norm.cdf(2 / np.sqrt(2)), norm.cdf(-1)
    reports = [verification_report(*normal_pairs(200, 300, seed=seed)) for seed in range(300)]
    held = [report.auc.low <= true_auc <= report.auc.high for report in reports]
    assert 0.91 <= np.mean(held) <= 0.99
    rates = [report.equal_error_rate for report in reports]
    assert np.mean([rate.low <= true_eer <= rate.high for rate in rates]) >= 0.95
    assert np.mean([rate.high - rate.low for rate in rates]) < 0.13
    assert np.mean(rates) == pytest.approx(true_eer, abs=0.005)


def test_thinned_curve_lies_on_the_whole_one():
    distances, same = normal_pairs(20_000, 60_000)
    report = verification_report(distances, same)
    assert 1000 < len(report.roc.thresholds) < 4000
    for far, tar, threshold in zip(*(part[1::97] for part in report.roc), strict=True):
        assert far == (distances[~same] <= threshold).mean()
        assert tar == (distances[same] <= threshold).mean()
    assert (report.roc.false_accept_rate[0], report.roc.false_accept_rate[-1]) == (0, 1)
    assert (report.roc.true_accept_rate[0], report.roc.true_accept_rate[-1]) == (0, 1)
    area = auc(report.roc.false_accept_rate, report.roc.true_accept_rate)
    assert area == pytest.approx(report.auc, abs=1e-4)
    positive = report.roc.false_accept_rate[report.roc.false_accept_rate > 0]
    assert positive[0] == 1 / 60_000  # dense at the low end


def test_millions_of_pairs_keep_within_memory():
    count = 5_000_000
    distances = np.random.default_rng(0).random(count, dtype=np.float32)
    same = np.arange(count) % 10 == 0
    distances[same] *= 0.5
    tracemalloc.start()
    try:
        report = verification_report(distances, same)
        text = str(report)
        curve = report.roc
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1.5 * distances.nbytes
    assert peak < 10 * distances.nbytes
    assert len(curve.thresholds) < 4000
    assert "500,000 same and 4,500,000 different pairs" in text
    # Uniform on [0, 0.5] against [0, 1]: a same pair is the farther one a quarter of the time.
    assert report.auc == pytest.approx(0.75, abs=0.002)
    assert report.equal_error_rate == pytest.approx(1 / 3, abs=0.002)
    assert report.tar_at_far(0.01) == pytest.approx(0.02, abs=0.001)


def test_tensors_and_arrays_of_any_precision_and_sign_give_the_same():
    reference = verification_report(DISTANCES, SAME)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.from_numpy(DISTANCES).to(dtype).requires_grad_()
        report = verification_report(tensor, torch.from_numpy(SAME))
        assert report.auc == pytest.approx(reference.auc)
        assert report.equal_error_rate == pytest.approx(reference.equal_error_rate)
        assert report.tar_at_far(0.5) == reference.tar_at_far(0.5)
    shifted = verification_report(DISTANCES - 5, SAME)
    assert shifted.auc == reference.auc


def test_arguments_are_left_as_they_are():
    distances, same = DISTANCES.copy(), SAME.copy()
    str(verification_report(distances, same))
    assert (distances == DISTANCES).all()
    assert (same == SAME).all()


def test_report_shows_itself_as_text_table_and_html():
    report = verification_report(*normal_pairs(300, 3000))
    frame = report.frame()
    assert list(frame.index) == ["AUC", "EER", "TAR at FAR 1 %", "TAR at FAR 0.1 %"]
    assert frame.loc["EER", "value"] == report.equal_error_rate
    assert frame.loc["EER", "threshold"] == report.equal_error_threshold
    assert frame.loc["TAR at FAR 1 %", "low"] == report.tar_at_far(0.01).low
    text = str(report)
    assert text.startswith("300 same and 3,000 different pairs\n")
    assert f"EER              {report.equal_error_rate}, threshold" in text
    assert "nan" not in text
    assert repr(report) == text
    html = report._repr_html_()
    assert "300 same" in html
    assert f"<td>{report.auc:.2%}</td>" in html
    assert isinstance(report, VerificationReport)
    with pytest.raises(AttributeError):
        report.same_distances = None


@pytest.mark.parametrize(
    ("distances", "same", "error", "message"),
    [
        ([0.1, 0.2], SAME, TypeError, "distances must be a torch.Tensor or array, got list"),
        (DISTANCES, [True] * 5, TypeError, "same must be a torch.Tensor or array, got list"),
        (DISTANCES[None], SAME, ValueError, r"distances must have shape \(n,\), got \(1, 5\)"),
        (np.arange(5), SAME, TypeError, "distances must be floating point, got int64"),
        (DISTANCES, SAME.astype(int), TypeError, "same must be bool, got int64"),
        (DISTANCES, SAME[:4], ValueError, r"same must have shape \(5,\).* got \(4,\)"),
        (np.where(SAME, DISTANCES, np.nan), SAME, ValueError, "must be finite, got nan at 1"),
        (np.where(SAME, DISTANCES, np.inf), SAME, ValueError, "must be finite, got inf at 1"),
        (DISTANCES, np.ones(5, bool), ValueError, "both kinds, got 5 of one class and 0 of two"),
        (DISTANCES, np.zeros(5, bool), ValueError, "both kinds, got 0 of one class and 5 of two"),
        (DISTANCES[:0], SAME[:0], ValueError, "both kinds, got 0 of one class and 0 of two"),
    ],
)
def test_bad_arguments_are_named(distances, same, error, message):
    with pytest.raises(error, match=message):
        verification_report(distances, same)


def test_bad_far_and_threshold_are_named():
    report = verification_report(DISTANCES, SAME)
    for far in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="far must be between 0 and 1"):
            report.tar_at_far(far)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        report.at(float("nan"))
    assert report.at(float("inf")) == (1.0, 0.0)
    assert report.at(-float("inf")) == (0.0, 1.0)
    assert report.threshold_at_far(1.0) == float("inf")


@pytest.mark.parametrize("block", [1, 7, 100, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_pairs_come_once_in_order_whatever_the_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(tripletlib.verification, "_BLOCK_ELEMENTS", block)
    embeddings, labels = points(23, dtype=dtype)
    distances, same = pair_distances(embeddings, labels)
    expected = [
        (float((embeddings[i] - embeddings[j]).norm()), bool(labels[i] == labels[j]))
        for i in range(23)
        for j in range(i + 1, 23)
    ]
    assert (distances.dtype, same.dtype) == (dtype, torch.bool)
    torch.testing.assert_close(distances, torch.tensor([d for d, _ in expected], dtype=dtype))
    assert same.tolist() == [s for _, s in expected]


def test_pairs_of_many_points_equal_the_matrix():
    embeddings, labels = points(1500)
    distances, same = pair_distances(embeddings, labels)
    first, second = torch.triu_indices(1500, 1500, offset=1)
    torch.testing.assert_close(distances, pairwise_distances(embeddings)[first, second])
    assert torch.equal(same, labels[first] == labels[second])


@pytest.mark.parametrize("block", [1, 64, 2**22])
def test_drawn_pairs_are_pairs_of_two_drawn_evenly(monkeypatch, block):
    monkeypatch.setattr(tripletlib.verification, "_BLOCK_ELEMENTS", block)
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # every difference tells its pair
    labels = torch.tensor([0, 1, 0, 1])
    generator = torch.Generator().manual_seed(0)
    distances, same = pair_distances(embeddings, labels, 6000, generator)
    found, counts = distances.unique(return_counts=True)
    assert found.tolist() == [1, 2, 3, 4, 6, 7]
    assert (counts - 1000).abs().max() < 5 * 30  # five standard deviations
    assert torch.equal(same, torch.isin(distances, torch.tensor([3.0, 6.0])))
    again, _ = pair_distances(embeddings, labels, 6000, generator.manual_seed(0))
    assert torch.equal(again, distances)
    other, _ = pair_distances(embeddings, labels, 6000, generator)
    assert not torch.equal(other, distances)


def test_more_pairs_may_be_drawn_than_there_are_and_half_precision_is_widened():
    embeddings, labels = points(2, dtype=torch.float16)
    distances, _ = pair_distances(embeddings.requires_grad_(), labels, count=10)
    assert distances.shape == (10,)
    assert distances.dtype == torch.float32
    assert not distances.requires_grad
    assert pair_distances(embeddings, labels)[0].dtype == torch.float32
    torch.testing.assert_close(distances, pair_distances(embeddings, labels)[0].expand(10))


def test_coincident_points_are_at_zero():
    distances, same = pair_distances(torch.full((40, 3), 0.7), torch.arange(40) // 2)
    assert (distances == 0).all()
    report = verification_report(distances, same)
    assert (report.auc, report.equal_error_rate) == (0.5, 0.5)


def test_bad_pairs_are_named():
    embeddings, labels = points(5)
    with pytest.raises(ValueError, match="embeddings must hold at least two rows, got 1"):
        pair_distances(embeddings[:1], labels[:1])
    with pytest.raises(ValueError, match="labels must have shape"):
        pair_distances(embeddings, labels[:4])
    with pytest.raises(ValueError, match="embeddings must be finite"):
        pair_distances(embeddings / 0, labels)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        pair_distances(embeddings, labels, count=0)


def test_the_chain_from_images_to_report():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 28, 28, generator=generator)
    labels = torch.arange(4).repeat(8)
    images = patterns[labels] + 0.1 * torch.randn(32, 1, 28, 28, generator=generator)
    report = verification_report(*pair_distances(EmbeddingNet().eval()(images), labels))
    assert report.same_pairs == 4 * 8 * 7 // 2
    assert report.different_pairs == 32 * 31 // 2 - report.same_pairs
    assert report.auc > 0.9


def faces_like_olivetti():
    """Ten pictures of each of 40 "people", in the layout of scikit-learn's file of the faces."""
    generator = torch.Generator().manual_seed(0)
    people = torch.rand(40, 1, 6, 6, generator=generator).repeat_interleave(10, dim=0)
    pictures = people + 0.15 * torch.rand(400, 1, 6, 6, generator=generator)
    light = 0.5 + torch.rand(400, 1, 1, 1, generator=generator)
    pictures = light * F.interpolate(pictures, size=(64, 64), mode="bicubic")
    return pictures.flatten(1).numpy()


@pytest.fixture
def olivetti_folder(tmp_path):
    """A folder in which scikit-learn finds the stand-in where it would keep the real faces."""
    joblib.dump(faces_like_olivetti(), tmp_path / "olivetti_py3.pkz", compress=6)
    return tmp_path


def test_faces_are_read_by_scikit_learn_and_standardised_one_by_one(olivetti_folder, monkeypatch):
    images, labels = load_olivetti(olivetti_folder)
    assert (images.shape, images.dtype) == ((400, 1, 64, 64), torch.float32)
    assert (labels.dtype, labels.bincount().tolist()) == (torch.int64, [10] * 40)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.zeros(400), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.square().mean(dim=(1, 2, 3)), torch.ones(400))
    theirs = sklearn.datasets.fetch_olivetti_faces(data_home=olivetti_folder)
    face = theirs.images[123].astype(float)
    expected = torch.from_numpy((face - face.mean()) / face.std()).float()
    torch.testing.assert_close(images[123, 0], expected, atol=1e-4, rtol=1e-4)
    assert labels.tolist() == theirs.target.tolist()
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(olivetti_folder))
    assert torch.equal(load_olivetti()[0], images)


def test_a_face_of_one_grey_is_finite(tmp_path):
    faces = faces_like_olivetti()
    faces[7] = 0.5
    joblib.dump(faces, tmp_path / "olivetti_py3.pkz")
    images, _ = load_olivetti(tmp_path)
    assert images[7].abs().max() < 0.2
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("error", [URLError("no network"), TimeoutError("slow"), OSError("proxy")])
def test_no_network_is_found_out_quietly_and_soon(tmp_path, monkeypatch, capsys, recwarn, error):
    attempts = []

    def urlretrieve(*_):
        attempts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr("sklearn.datasets._base.urlretrieve", urlretrieve)
    before = socket.getdefaulttimeout()
    with pytest.raises(RuntimeError, match=r"could not load the Olivetti faces .*Check that there"):
        load_olivetti(tmp_path)
    assert 1 <= len(attempts) <= 2
    assert all(timeout <= 10 for timeout in attempts)
    assert socket.getdefaulttimeout() == before
    assert capsys.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_damaged_faces_are_named(tmp_path, content):
    (tmp_path / "olivetti_py3.pkz").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"Olivetti faces .*damaged, delete it"):
        load_olivetti(tmp_path)


def test_the_chain_of_the_chapter_runs_on_what_looks_like_the_faces(olivetti_folder):
    images, labels = load_olivetti(olivetti_folder)
    images, seen = F.avg_pool2d(images, 2), labels < 30
    batches = BalancedBatchSampler(labels[seen], 10, 4, generator=torch.Generator().manual_seed(0))
    network = EmbeddingNet()
    fit(
        network, images[seen], labels[seen], epochs=1, batch_sampler=batches, seed=0, progress=False
    )
    report = verification_report(*pair_distances(network(images[~seen]), labels[~seen]))
    assert (report.same_pairs, report.different_pairs) == (450, 4500)
    assert report.auc > 0.9


def test_the_threshold_accepts_exactly_the_pairs_that_the_rate_allows():
    for pairs in (*range(1, 24), 37, 59, 93, 160, 200, 1000):
        report = verification_report(np.arange(1.0 + pairs), np.array([True] + [False] * pairs))
        for accepted in range(0, pairs + 1, max(1, pairs // 60)):
            exact = accepted / pairs
            for far in (np.nextafter(exact, 0), exact, np.nextafter(exact, 1)):
                allowed = max(k for k in range(pairs + 1) if k / pairs <= far)
                threshold = report.threshold_at_far(float(far))
                assert (report.different_distances <= threshold).sum() == allowed
                assert report.at(threshold).false_accept_rate <= far


@pytest.mark.parametrize("device", [*DEVICES, FAKE])
@pytest.mark.parametrize("count", [None, 40])
def test_pairs_and_their_report_on_any_device(device, count):
    embeddings, labels = points(30)

    def drawn(embeddings, labels):
        return pair_distances(embeddings, labels, count, torch.Generator().manual_seed(1))

    right = drawn(embeddings, labels)
    with FakeDevice():
        for distances, same in (
            drawn(embeddings.to(device), labels.to(device)),
            drawn(embeddings.to(device), labels),
            drawn(embeddings, labels.to(device)),
        ):
            assert distances.device == same.device
            assert same.tolist() == right[1].tolist()
            np.testing.assert_allclose(distances.tolist(), right[0].tolist(), rtol=1e-6)
            assert verification_report(distances, same.cpu()).auc == pytest.approx(
                verification_report(*right).auc
            )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, drawn(embeddings, labels), right))


@pytest.mark.parametrize(
    "far",
    [
        np.float16(0.1),
        np.float32(0.1),
        np.longdouble("0.1"),
        np.array(0.1, np.float16),
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.logspace(-3, 0, 4)[1],
        Fraction(1, 10),
        0,
        True,
    ],
)
def test_a_rate_of_any_type_is_the_number_that_it_is(far):
    pairs = 1_000_000
    report = verification_report(np.arange(pairs + 1.0), np.arange(pairs + 1) == 0)
    allowed = int(Fraction(float(far)) * pairs)
    accepted = (report.different_distances <= report.threshold_at_far(far)).sum()
    assert accepted == allowed


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_a_threshold_is_compared_in_the_precision_of_the_distances(dtype):
    generator = np.random.default_rng(0)
    distances = generator.choice(np.linspace(-1, 1, 21), 400).astype(dtype)
    distances[:2] = np.finfo(np.float16).max, np.finfo(np.float16).min
    same = np.arange(400) % 2 == 0
    report = verification_report(distances, same)
    near = np.unique(distances).astype(float)
    thresholds = [
        *near, *np.nextafter(near, 9), *np.nextafter(near, -9), *np.linspace(-1, 1, 21),
        *(sign * size for sign in (1, -1) for size in (1e5, 1e39, 1e300, np.inf)),
        np.float32(0.3), torch.tensor(0.3), np.float16(0.3), 10**30, Fraction(3, 10),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for threshold in thresholds:
            with np.errstate(over="ignore"):
                accepted = distances <= dtype(threshold)
            if dtype is not np.longdouble:
                compared = torch.from_numpy(distances) <= float(threshold)
                assert compared.tolist() == accepted.tolist()
            assert report.at(threshold) == (accepted[~same].mean(), (~accepted[same]).mean())


@pytest.mark.parametrize("bad", ["0.1", None, [0.1], 1j, np.array([0.1]), torch.ones(2), {}])
def test_what_is_no_number_is_named(bad):
    report = verification_report(DISTANCES, SAME)
    for measure in (report.tar_at_far, report.threshold_at_far):
        with pytest.raises(TypeError, match="far must be a number, got"):
            measure(bad)
    with pytest.raises(TypeError, match="threshold must be a number, got"):
        report.at(bad)


def distances_of_far_pairs(embeddings):
    """The distances of drawn pairs and of all."""
    labels = torch.arange(len(embeddings))
    return (pair_distances(embeddings, labels, count)[0].unique() for count in (300, None))


@pytest.mark.parametrize(
    "embeddings",
    [
        torch.tensor([[3e38], [-3e38], [1.0]]),
        torch.tensor([[3e38, 3e38], [-1e38, 0.0], [1.0, 3e-40]]),
        torch.tensor([[1.7e308], [-1.7e308], [1.0]], dtype=torch.float64),
        torch.tensor([[1.5e308, 0.0], [0.0, 0.0], [0.0, 1e300]], dtype=torch.float64),
        torch.tensor([[3e38], [-3e38], [1e-30], [2e-30]], dtype=torch.bfloat16),
        torch.tensor([[65504.0], [-65504.0], [6e-8]], dtype=torch.float16),
    ],
)
def test_drawn_pairs_are_as_far_apart_as_in_all(embeddings):
    drawn, whole = distances_of_far_pairs(embeddings)
    torch.testing.assert_close(drawn, whole, rtol=1e-6, atol=0)
    assert whole.isfinite().all()
    if embeddings.dtype != torch.float64:
        with NoDouble():
            for of in distances_of_far_pairs(embeddings):
                torch.testing.assert_close(of, whole, rtol=1e-6, atol=0)


def test_a_count_of_numpy_is_a_count():
    embeddings, labels = points(5)
    assert pair_distances(embeddings, labels, np.int64(3))[0].shape == (3,)
