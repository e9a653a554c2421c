"""Mutations: MAF files, classes and terms, and the choice among samples."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.consequences import PROTEIN_CHANGING, consequences, severest
from morphome.genomics.maf import maf_table
from morphome.genomics.samples import choose_samples
from morphome.genomics.sources import read_panel

HEADER = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\tSample Type\n"


class Folder:
    """A folder of MAF files, one per patient, with its sample sheet."""

    def __init__(self, root: Path) -> None:
        self.root, self.sheet = root, root / "sheet.tsv"
        self.sheet.write_text(HEADER)

    def add(self, file_id: str, case: str, sample: str, content: bytes):
        with self.sheet.open("a") as handle:
            handle.write(f"{file_id}\tx.maf.gz\tx\tMasked Somatic Mutation\tTCGA-X\t{case}\t{sample}\tx\n")
        (self.root / file_id).mkdir()
        (self.root / file_id / "x.maf.gz").write_bytes(content)

    def read(self, **more):
        return read_panel("mut", {"format": "maf", "path": str(self.root), **more}, self.sheet)


def maf(*rows: tuple[str, str, str]) -> bytes:
    """A gzipped MAF with ``(gene, class, barcode)``."""
    lines = [
        "#version gdc-1.0.0",
        "#tumor.aliquot x",
        "Hugo_Symbol\tCenter\tVariant_Classification\tTumor_Sample_Barcode",
    ]
    lines += [f"{gene}\tWUGSC #1\t{kind}\t{barcode}" for gene, kind, barcode in rows]
    return gzip.compress(("\n".join(lines) + "\n").encode())


def test_maf_per_patient(tmp_path):
    folder = Folder(tmp_path)
    one, two = "TCGA-05-0001-01A-11D-1893-08", "TCGA-05-0002-01A-11D-1893-08"
    pair = "{0}, {0}", "{0}-01A, {0}-10A"
    rows = [("TP53", "Missense_Mutation", one), ("TTN", "Silent", one), ("KRAS", "Intron", one)]
    for number, content in enumerate(
        [maf(*rows), maf(("TTN", "Splice_Site", two), ("Unknown", "In_Frame_Del", two)), maf()]
    ):
        case = f"TCGA-05-000{number + 1}"
        folder.add(f"u{number}", pair[0].format(case), pair[1].format(case), content)
    panel = folder.read()
    assert panel.genes == ["TP53", "TTN"]  # only those mutated at least once
    # the third patient was sequenced and has no mutation: zeros, not absent
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002", "TCGA-05-0003"]
    assert panel.values.tolist() == [[1, 0], [0, 1], [0, 0]] and panel.value_type == "binary"


def test_maf_of_another_patient_is_refused(tmp_path):
    folder = Folder(tmp_path)
    folder.add("u", "TCGA-05-0001", "TCGA-05-0001-01A", maf(("TP53", "Silent", "TCGA-05-0002-01A-11D-1893-08")))
    with pytest.raises(MorphomeError, match=r"x\.maf\.gz: holds sample TCGA-05-0002"):
        folder.read()


def test_maf_of_another_sample_is_refused(tmp_path):
    folder = Folder(tmp_path)
    metastasis = maf(("TP53", "Silent", "TCGA-05-0001-06A-11D-1893-08"))
    folder.add("u", "TCGA-05-0001", "TCGA-05-0001-01A", metastasis)
    said = r"holds sample TCGA-05-0001-06A-11D-1893-08, but the sample sheet says patient TCGA-05-0001, sample code 01"
    with pytest.raises(MorphomeError, match=said):
        folder.read()
    # The code that the sheet gives to the chosen file is asked for, not just any of the configured ones.
    folder.sheet.write_text(folder.sheet.read_text().replace("0001-01A", "0001-06A"))
    assert folder.read(consequences="all").genes == ["TP53"]
    # Files of other projects, and sheets that do not say the sample, are taken at their word.
    folder.sheet.write_text(folder.sheet.read_text().replace("TCGA-05-0001-06A", ""))
    assert folder.read(consequences="all").genes == ["TP53"]


def test_one_maf_of_many_samples(tmp_path):
    path = tmp_path / "all.maf.gz"
    path.write_bytes(
        maf(
            ("TP53", "Missense_Mutation", "TCGA-05-0001-01A-11D-1893-08"),
            ("KRAS", "Missense_Mutation", "TCGA-05-0001-02A-11D-1893-08"),
            ("TTN", "Silent", "TCGA-05-0002-01A-11D-1893-08"),
            ("FLT3", "In_Frame_Ins", "TCGA-AB-3009-03A-01W-0745-08"),
        )
    )
    panel = read_panel("mut", {"format": "maf", "path": str(path)}, None)
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002", "TCGA-AB-3009"]
    assert panel.genes == ["FLT3", "TP53"]
    assert panel.values.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_sample_choice_lowest_vial_then_highest_portion_and_plate():
    name = "TCGA-05-0001-{}-{}D-{}-08".format
    best = name("01A", "21", "1893")
    others = [
        name("01B", "31", "9999"),
        name("01A", "11", "9999"),
        name("01A", "21", "1500"),
        name("06A", "99", "9999"),
    ]
    for order in ([best, *others], [*others, best], [*others[2:], best, *others[:2]]):
        chosen, left_out = choose_samples(order)
        assert chosen == {"TCGA-05-0001": best}
        assert left_out == {"further sample of the same patient": 4}
    assert choose_samples(["mine", "TCGA-05-0002-11A-11D-1893-08"]) == (
        {"mine": "mine"},
        {"sample type 11 (solid tissue normal)": 1},
    )


ONE = "TCGA-05-0001-01A-11D-1893-08"
KINDS = ["Missense_Mutation", "Nonsense_Mutation", "Silent", "Intron", "5'Flank", "Splice_Site"]


def many(tmp_path, **more):
    path = tmp_path / "all.maf.gz"
    path.write_bytes(maf(*((f"G{number}", kind, ONE) for number, kind in enumerate(KINDS))))
    return read_panel("mut", {"format": "maf", "path": str(path), **more}, None)


@pytest.mark.parametrize(
    ("rule", "genes", "unit"),
    [
        ("protein_changing", ["G0", "G1", "G5"], "1 = protein-changing variant"),
        ("truncating", ["G1", "G5"], "1 = truncating variant"),
        ("all", ["G0", "G1", "G2", "G3", "G4", "G5"], "1 = variant"),
        (["Silent", "5'Flank"], ["G2", "G4"], "1 = variant of a listed class"),
        (["missense_variant", "Silent"], ["G2"], "1 = variant of a listed class"),
    ],
)
def test_consequences_of_a_maf(tmp_path, rule, genes, unit):
    panel = many(tmp_path, consequences=rule)
    assert panel.genes == genes and panel.unit == unit
    notes = panel.notes
    assert sum(notes["variants_kept"].values()) == len(genes)
    counted = {**notes["variants_kept"], **notes["variants_passed_over"]}
    assert counted == dict.fromkeys(KINDS, 1)


def test_unknown_classes_are_refused_with_near_ones(tmp_path):
    with pytest.raises(MorphomeError, match=r"'Missense' is no class of variants; near: Missense_Mutation"):
        many(tmp_path, consequences=["Silent", "Missense"])
    with pytest.raises(MorphomeError, match=r"consequences: 'damaging' is no rule(.|\n)*truncating, all"):
        many(tmp_path, consequences="damaging")
    folder = Folder(tmp_path)
    own = maf(("G", "House_Class", ONE), ("H", "Silent", ONE))
    folder.add("u", "TCGA-05-0001", "TCGA-05-0001-01A", own)
    assert folder.read(consequences=["House_Class"]).genes == ["G"]  # not ours, but in the file


def test_classes_are_known_in_any_case(tmp_path):
    path = tmp_path / "all.maf.gz"
    kinds = ["missense_mutation", "FRAME_SHIFT_DEL", "silent", "Stop_Codon_Del", "start_codon_snp"]
    kinds += ["De_novo_Start_OutOfFrame", "De_novo_Start_InFrame", "Splice_Site;Silent"]
    path.write_bytes(maf(*((f"G{number}", kind, ONE) for number, kind in enumerate(kinds))))
    table = {"format": "maf", "path": str(path)}
    panel = read_panel("mut", table, None)
    assert panel.genes == ["G0", "G1", "G3", "G4", "G7"] and panel.notes["variants_of_classes_not_known"] == {}
    assert panel.notes["variants_passed_over"] == {
        **{"De_novo_Start_InFrame": 1, "De_novo_Start_OutOfFrame": 1, "Silent": 1}
    }
    assert panel.notes["variants_kept"]["Missense_Mutation"] == 1
    listed = read_panel("mut", {**table, "consequences": ["SILENT", "stop_codon_del"]}, None)
    assert listed.genes == ["G2", "G3"]


def test_classes_that_nothing_knows_are_told_once(tmp_path):
    path = tmp_path / "all.maf.gz"
    rows = [("A", "House_Class", ONE), ("B", "House_Class", ONE), ("C", "Missense_Mutation", ONE), ("D", "", ONE)]
    path.write_bytes(maf(*rows))
    table = {"format": "maf", "path": str(path)}
    said = (
        r"molecular\.mut: 3 variants of classes that are not known do not count: 'House_Class' \(2\), '\(empty\)' \(1\)"
    )
    with pytest.warns(MorphomeWarning, match=said) as told:
        panel = read_panel("mut", table, None)
    assert len(told) == 1 and panel.genes == ["C"]
    unknown = {"(empty)": 1, "House_Class": 2}
    assert panel.notes["variants_of_classes_not_known"] == panel.notes["variants_passed_over"] == unknown
    assert read_panel("mut", {**table, "consequences": "all"}, None).genes == [
        "A",
        "B",
        "C",
        "D",
    ]  # all count: no warning


def test_germline_and_nameless_variants_are_passed_over(tmp_path):
    path = tmp_path / "all.maf"
    rows = [("A", "Somatic"), ("B", "Germline"), ("C", "LOH"), ("Unknown", "Somatic"), ("D|aaa", "")]
    lines = ["Hugo_Symbol\tGene\tVariant_Classification\tTumor_Sample_Barcode\tMutation_Status"]
    lines += [f"{gene}\tENSG0{gene[0]}\tMissense_Mutation\t{ONE}\t{status}" for gene, status in rows]
    path.write_text("\n".join(lines) + "\n")
    panel = read_panel("mut", {"format": "maf", "path": str(path)}, None)
    assert panel.genes == ["A", "D"] and panel.gene_ids == {"A": "ENSG0A", "D": "ENSG0D"}
    assert panel.notes["variants_passed_over"] == {"no gene symbol": 1, "status Germline": 1, "status LOH": 1}


@pytest.mark.parametrize(
    ("effect", "term", "changes"),
    [
        ("missense_variant", "missense_variant", True),
        ("splice_region_variant;synonymous_variant", "splice_region_variant", False),
        ("splice_region_variant,missense_variant", "missense_variant", True),
        ("intron_variant&splice_donor_variant", "splice_donor_variant", True),
        ("STOP_GAINED", "stop_gained", True),
        ("frameshift_variant", "frameshift_variant", True),
        ("inframe_deletion;splice_region_variant", "inframe_deletion", True),
        ("Missense_Mutation", "Missense_Mutation", True),
        ("synonymous_variant", "synonymous_variant", False),
        ("something_new", "something_new", False),
        ("", "(empty)", False),
    ],
)
def test_terms_and_classes(effect, term, changes):
    assert severest(effect) == term
    assert consequences(None).counts(effect) is changes
    assert consequences("all").counts(effect)


def test_codes_decide_among_samples():
    ids = ["TCGA-05-0001-01", "TCGA-05-0001-06", "TCGA-05-0001-11", "S9", "S2"]
    owners = {"S9": "P", "S2": "P"}
    chosen, left_out = choose_samples(ids, ("06", "01"), owners)
    assert chosen == {"P": "S2", "TCGA-05-0001": "TCGA-05-0001-06"}
    assert left_out == {"further sample of the same patient": 2, "sample type 11 (solid tissue normal)": 1}


def test_real_maf_classes(shared_data):
    """42,727 variants, 9,667 of them silent; the rest is counted by class, nothing is lost."""
    path = shared_data / "tables/maf/mc3_LGG.maf.gz"
    table = maf_table(path)
    assert len(table) == 42727 and (table["Variant_Classification"] == "Silent").sum() == 9667
    panel = read_panel("mut", {"format": "maf", "path": str(path)}, None)
    notes = panel.notes
    kept, passed = sum(notes["variants_kept"].values()), sum(notes["variants_passed_over"].values())
    assert kept + passed + notes["variants_of_samples_left_out"] == 42727
    assert set(notes["variants_kept"]) <= PROTEIN_CHANGING
    assert notes["variants_passed_over"]["Silent"] == 8779  # the 14 recurrences hold the other 888
    silent = read_panel("mut", {"format": "maf", "path": str(path), "consequences": ["Silent"]}, None)
    assert silent.notes["variants_kept"] == {"Silent": 8779}
    truncating = read_panel("mut", {"format": "maf", "path": str(path), "consequences": "truncating"}, None)
    assert set(truncating.genes) < set(panel.genes) and truncating.values.sum() < panel.values.sum()


def test_real_maf_against_the_porpoise_columns(shared_data):
    """479 shared patients: protein-changing calls agree for IDH1 and TP53 in all, for TTN in 98.5 %."""
    called = read_panel("mut", {"format": "maf", "path": str(shared_data / "tables/maf/mc3_LGG.maf.gz")}, None)
    path = shared_data / "tables/porpoise/tcga_gbmlgg_all_clean.csv.zip"
    table = read_panel("mut", {"format": "porpoise", "path": str(path)}, None)
    assert called.values.shape[0] == 511 and called.notes["left_out"] == {"sample type 02 (recurrent solid tumour)": 14}
    shared = sorted(set(called.patients) & set(table.patients))
    assert len(shared) == 479
    for gene, least in (("IDH1", 1.0), ("TP53", 1.0), ("TTN", 0.98)):
        pair = [
            panel.values[[panel.patients.index(p) for p in shared], panel.genes.index(gene)]
            for panel in (called, table)
        ]
        assert (pair[0] == pair[1]).mean() >= least
        assert 0 < pair[0].mean() < 1
