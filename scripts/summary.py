"""Print a small table of the newest local runs and where the book lies: the last step of `make run`."""

from pathlib import Path

import pandas as pd

from lpft_nb.intervals import confidence_interval, interval_text
from lpft_nb.records import load_results
from lpft_nb.store.names import METHODS

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"test": "in distribution", "ood/other-libraries": "out of distribution"}


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method the runs of the configuration that ran last, of the task that ran last."""
    last = rows.loc[rows["created"].idxmax()]
    rows = rows[(rows["task"] == last["task"]) & (rows["model"] == last["model"])]
    settings = rows.sort_values("created").groupby("method")["configuration"].last()
    return rows[rows["configuration"] == rows["method"].map(settings)]


def percent(values: pd.Series) -> str:
    """Mean and half the width of the 95 % interval, in percent."""
    return interval_text(confidence_interval(values), scale=100)


def summary(results: pd.DataFrame) -> str:
    """Accuracy of the newest runs, one row a method, one column a split."""
    rows = newest(
        results.query(
            "final and status == 'finished' and metric == 'accuracy' and split in @SPLITS"
        )
    )
    table = rows.groupby(["method", "split"])["value"].agg(percent).unstack("split", fill_value="")
    order = [method for method in METHODS if method in table.index]
    table = table.loc[order, [split for split in SPLITS if split in table]].rename(columns=SPLITS)
    table.insert(0, "seeds", rows.groupby("method")["seed"].nunique())
    title = f"Accuracy in percent on {rows['task'].iloc[0]} with {rows['model'].iloc[0]}: mean ± half the 95 % interval over seeds"
    return f"{title}\n\n{table.rename_axis(index=None, columns=None).to_string()}"


if __name__ == "__main__":
    print(f"\n{summary(load_results(ROOT / 'runs'))}\n")
    print(
        f"The book, with this run as its last page: {(ROOT / '_build' / 'html' / 'index.html').as_uri()}"
    )
