"""Count the mistakes of a segmentation by kind: nuclei missed, merged, split, badly outlined, or made up."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.metrics import Overlaps

ERRORS = ("missed", "merged", "split", "outline", "false")


def kinds_of_error(overlaps: Overlaps) -> dict[str, int]:
    """Count the nuclei without a match (IoU > 0.5) by kind of error.

    Parameters
    ----------
    overlaps : Overlaps
        Overlaps of truth and prediction.

    Returns
    -------
    dict of str to int
        Number of nuclei of each of `ERRORS`. A truth without a match counts as the first of these that applies:

        ``merged``
            Most of it lies in a prediction that also holds most of another truth.
        ``split``
            Two or more predictions lie mostly in it.
        ``missed``
            Less than a quarter of it is covered by predictions.
        ``outline``
            All others.

        ``false`` counts the predictions without a match of which less than a quarter lies in truths.
    """
    n_truth, n_pred = len(overlaps.truth_area), len(overlaps.pred_area)
    t, p, pixels = overlaps.truth_index, overlaps.pred_index, overlaps.pixels
    over = overlaps.iou > 0.5
    matched_truth, matched_pred = np.zeros(n_truth, bool), np.zeros(n_pred, bool)
    matched_truth[t[over]], matched_pred[p[over]] = True, True
    holds = 2 * pixels > overlaps.truth_area[t]  # the prediction holds most of the truth
    lies = 2 * pixels > overlaps.pred_area[p]  # the prediction lies mostly in the truth
    crowded = np.bincount(p[holds], minlength=n_pred) > 1
    merged = np.zeros(n_truth, bool)
    merged[t[holds & crowded[p]]] = True
    pieces = np.bincount(t[lies], minlength=n_truth) > 1
    covered = np.bincount(t, weights=pixels, minlength=n_truth) / np.maximum(overlaps.truth_area, 1)
    inside = np.bincount(p, weights=pixels, minlength=n_pred) / np.maximum(overlaps.pred_area, 1)
    left = ~matched_truth
    kinds = {"merged": left & merged}
    kinds["split"] = left & pieces & ~merged
    rest = left & ~merged & ~pieces
    kinds["missed"] = rest & (covered < 0.25)
    kinds["outline"] = rest & (covered >= 0.25)
    kinds["false"] = ~matched_pred & (inside < 0.25)
    return {name: int(kinds[name].sum()) for name in ERRORS}
