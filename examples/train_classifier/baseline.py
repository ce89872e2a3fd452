# SPDX-License-Identifier: Apache-2.0
"""What a linear classifier on TF-IDF features reaches on the same split: the bar for the model.

Writes accuracy on the held-out part, with words alone and with words and bigrams, for several
strengths of regularisation; the model has to beat the best of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC
from tqdm import tqdm

from glosses import read_jsonl


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".data/wordnet"), help="from prepare.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("baseline.json"))
    parser.add_argument("--c", type=float, nargs="+", default=[0.4, 0.8, 1.6, 3.2])
    options = parser.parse_args(arguments)

    train = read_jsonl(options.data / "train.jsonl")
    held_out = read_jsonl(options.data / "held_out.jsonl")
    labels = [g.label for g in train]
    truth = [g.label for g in held_out]
    started = time.perf_counter()
    results: dict[str, dict[str, float]] = {}
    for name, ngrams in (("words", (1, 1)), ("words and bigrams", (1, 2))):
        vectorizer = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True)
        features = vectorizer.fit_transform([g.text for g in train])
        held_out_features = vectorizer.transform([g.text for g in held_out])
        results[name] = {
            str(c): float(LinearSVC(C=c).fit(features, labels).score(held_out_features, truth))
            for c in tqdm(options.c, desc=name)
        }
    report = {
        "classifier": "sklearn.svm.LinearSVC on TfidfVectorizer(sublinear_tf=True)",
        "accuracy by C": results,
        "best accuracy": max(max(by_c.values()) for by_c in results.values()),
        "train": len(train),
        "held_out": len(held_out),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"scikit-learn": sklearn.__version__},
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
