"""The list of claims that the first and the last page of the reader's path share."""

import re

import yaml
from book_build import ROOT

CLAIMS = yaml.safe_load((ROOT / "nbs/claims.yml").read_text(encoding="utf-8"))


def test_claims_are_numbered_without_gaps_and_answered_by_a_chapter():
    for paper, count in {"A": 12, "B": 7, "C": 7, "D": 6, "E": 6}.items():
        numbers = [claim["number"] for claim in CLAIMS if claim["paper"] == paper]
        assert numbers == [f"{paper}{number}" for number in range(1, count + 1)]
    for claim in CLAIMS:
        assert claim["paper"] in ("A", "B", "C", "D", "E")
        assert claim["kind"] in ("exact", "measured"), claim["number"]
        assert (ROOT / f"nbs/{claim['chapter']}.ipynb").is_file(), claim["number"]


def test_parts_are_named_after_their_claim_and_by_no_other():
    parts = [(claim["number"], part) for claim in CLAIMS for part in claim["parts"]]
    assert len({part for _, part in parts}) == len(parts)
    for number, part in parts:
        assert re.fullmatch(f"{number}[a-z]?", part), part


def test_a_chapter_speaks_of_no_claim_that_the_list_lacks():
    known = {part for claim in CLAIMS for part in claim["parts"]}
    known |= {claim["number"] for claim in CLAIMS}
    for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb")):
        named = set(
            re.findall(r"\bclaims? ([A-E]\d+[a-f]?)\b", path.read_text(encoding="utf-8"), re.I)
        )
        assert named <= known, f"{path.name}: {sorted(named - known)}"
