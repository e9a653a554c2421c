"""Clinical and molecular tables of the simulated cohort, in the shapes that the Genomic Data Commons gives.

Shapes: the portal's ``clinical.tsv`` (two rows per case, one per kind of treatment), its sample sheet, STAR counts
with GENCODE gene names, masked somatic mutations per aliquot (MAF, gzip) and gene-level copy number. Ensembl ids,
positions, lengths and every value are made up.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from morphome.cohort.design import PROJECT, Design, made_up_number, made_up_uuid
from morphome.cohort.gene_families import MUTATION_FREQUENCY, choose_genes, signal_genes, words
from morphome.cohort.outcome_model import Outcomes
from morphome.cohort.values import DAYS_PER_YEAR

MISSING = "'--"
#: Loading of the signal genes on z2 and the spread of one unit of latent expression in log counts.
LOADING, LOG_SPREAD = 0.9, 0.7
DISPERSION = 0.08
#: A gene of the pseudo-autosomal region: STAR files list its copy on Y as a second row with the same symbol.
PAR_GENE = "CRLF2"
_STAGES = ("Stage I", "Stage IIA", "Stage IIIB", "Stage IV")
_TREATMENTS = ("Pharmaceutical Therapy, NOS", "Radiation Therapy, NOS")
_MISSENSE, _SILENT = "Missense_Mutation", "Silent"
_EFFECTS = (_MISSENSE, _SILENT, "Nonsense_Mutation", "Frame_Shift_Del", "Splice_Site", "Intron")
_EFFECT_SHARES = (0.55, 0.22, 0.07, 0.06, 0.04, 0.06)


@dataclass(frozen=True)
class Gene:
    """A gene of the simulated annotation; all but the symbol is made up."""

    symbol: str
    ensembl: str
    chromosome: str
    start: int
    length: int


def annotation(count: int) -> list[Gene]:
    """The simulated genes in the order of their made-up Ensembl ids (``ENSG00990000001.4`` ...)."""
    genes = []
    for number, symbol in enumerate(sorted(choose_genes(count)), start=1):
        genes.append(
            Gene(
                symbol=symbol,
                ensembl=f"ENSG00990{number:06d}.{1 + made_up_number(15, symbol, 'version')}",
                chromosome=f"chr{1 + made_up_number(22, symbol, 'chromosome')}",
                start=1_000_000 + made_up_number(100_000_000, symbol, "start"),
                length=1_000 + made_up_number(5_000, symbol, "length"),
            )
        )
    return genes


# -- clinical -------------------------------------------------------------------------------------------------
def clinical_tsv(design: Design, outcomes: Outcomes, seed: int) -> str:
    """The portal's clinical table: two rows per case, rows in the order of the cases' UUIDs, ``'--`` for missing.

    Stage is cut from z1 + z2 + noise, grade from z1 + noise, age is weakly related to z1 + z2, sex is not. One
    patient has no stage, one no age. A patient without any file closes the list of cases.
    """
    rng = np.random.default_rng([seed, 2])
    count = len(design.patients)
    both = (outcomes.z1 + outcomes.z2) / np.sqrt(2.4)
    stage = np.digitize(both + 1.15 * rng.standard_normal(count), (-0.9, 0.1, 1.2))
    grade = 1 + np.digitize(outcomes.z1 + 1.3 * rng.standard_normal(count), (-0.7, 0.9))
    age = np.clip(63 + 10 * (0.25 * both + 0.97 * rng.standard_normal(count)), 24, 89.9) * DAYS_PER_YEAR
    age_days = np.rint(age).astype(int)
    male = rng.random(count) < 0.6
    gaps = rng.choice(count, 2, replace=False)
    cases = []
    for i, patient in enumerate(design.patients):
        dead, days = outcomes.event[i] == 1, int(outcomes.days[i])
        last_seen = rng.random()
        case = _case(patient, seed, int(age_days[i]), bool(male[i]))
        case |= {
            "vital_status": "Dead" if dead else "Alive",
            "days_to_death": str(days) if dead else MISSING,
            # The dead often have an earlier visit on record, or none.
            "days_to_last_follow_up": (
                str(days) if not dead else str(int(days * last_seen)) if last_seen > 0.5 else MISSING
            ),
            "ajcc_pathologic_stage": MISSING if i == gaps[0] else _STAGES[stage[i]],
            "tumor_grade": f"G{grade[i]}",
        }
        if i == gaps[1]:
            case |= dict.fromkeys(("age_at_diagnosis", "age_at_index", "days_to_birth"), MISSING)
        cases.append(case)
    for patient in design.without_slide:
        case = _case(patient, seed, 23_000, False)
        cases.append(case | {"vital_status": "Alive", "days_to_last_follow_up": "731"})
    cases.sort(key=lambda case: case["case_id"])
    rows = [
        case | {"treatment_type": kind, "treatment_or_therapy": ("yes", "no")[made_up_number(2, kind, case["case_id"])]}
        for case in cases
        for kind in _TREATMENTS
    ]
    return _tsv([_CLINICAL_COLUMNS, *([row.get(c, MISSING) for c in _CLINICAL_COLUMNS] for row in rows)])


def _case(patient: str, seed: int, age_days: int, male: bool) -> dict[str, str]:
    return {
        "case_id": made_up_uuid(seed, "case", patient),
        "case_submitter_id": patient,
        "project_id": PROJECT,
        "age_at_index": str(int(age_days / DAYS_PER_YEAR)),
        "days_to_birth": str(-age_days),
        "age_at_diagnosis": str(age_days),
        "gender": "male" if male else "female",
        "ethnicity": "not reported",
        "race": "not reported",
        "classification_of_tumor": "not reported",
        "days_to_diagnosis": "0",
        "last_known_disease_status": "not reported",
        "primary_diagnosis": "Carcinoma, NOS",
        "morphology": "8010/3",
        "progression_or_recurrence": "not reported",
        "tumor_grade": "not reported",
        "year_of_diagnosis": str(2008 + made_up_number(6, "year", patient)),
    }


_CLINICAL_COLUMNS = words(
    "case_id case_submitter_id project_id age_at_index age_is_obfuscated cause_of_death "
    "days_to_birth days_to_death ethnicity gender race vital_status year_of_birth year_of_death "
    "age_at_diagnosis ajcc_clinical_stage ajcc_pathologic_m ajcc_pathologic_n "
    "ajcc_pathologic_stage ajcc_pathologic_t classification_of_tumor days_to_diagnosis "
    "days_to_last_follow_up days_to_last_known_disease_status days_to_recurrence figo_stage "
    "icd_10_code last_known_disease_status morphology primary_diagnosis prior_malignancy "
    "prior_treatment progression_or_recurrence residual_disease site_of_resection_or_biopsy "
    "synchronous_malignancy tissue_or_organ_of_origin tumor_grade tumor_stage year_of_diagnosis "
    "treatment_intent_type treatment_or_therapy treatment_outcome treatment_type"
)


# -- molecular ------------------------------------------------------------------------------------------------
def star_counts(design: Design, outcomes: Outcomes, genes: Sequence[Gene], seed: int) -> Iterable[tuple[str, str]]:
    """(patient, text) of every patient's augmented STAR gene counts.

    Latent expression is 0.9 z2 + N(0,1) for the twenty signal genes and N(0,1) for the others; counts are negative
    binomial around its exponential, with a depth per patient; TPM and FPKM follow from the counts and lengths.
    """
    rng = np.random.default_rng([seed, 3])
    signal = np.isin([gene.symbol for gene in genes], sorted(signal_genes()))
    level = rng.normal(6.5, 0.9, len(genes))
    length = np.array([gene.length for gene in genes], float)
    for i, patient in enumerate(design.patients):
        latent = rng.standard_normal(len(genes)) + np.where(signal, LOADING * outcomes.z2[i], 0)
        depth = np.exp(0.3 * rng.standard_normal())
        mean = depth * length / length.mean() * np.exp(level + LOG_SPREAD * latent)
        counts = rng.negative_binomial(1 / DISPERSION, 1 / (1 + DISPERSION * mean))
        yield patient, _star_text(genes, counts, length, rng)


def _star_text(
    genes: Sequence[Gene], counts: NDArray[np.int64], length: NDArray[np.float64], rng: np.random.Generator
) -> str:
    rate = counts / length
    tpm = 1e6 * rate / rate.sum()
    fpkm = 1e9 * rate / counts.sum()
    fpkm_uq = 1e9 * rate / (np.quantile(counts, 0.75) * len(counts))
    first = rng.binomial(counts, 0.5)
    rows: list[Sequence[object]] = [
        words(
            "gene_id gene_name gene_type unstranded stranded_first stranded_second tpm_unstranded "
            "fpkm_unstranded fpkm_uq_unstranded"
        )
    ]
    total = int(counts.sum())
    for name, share in (("unmapped", 0.03), ("multimapping", 0.06), ("noFeature", 0.05), ("ambiguous", 0.08)):
        rows.append([f"N_{name}", "", "", *[int(share * total)] * 3, "", "", ""])
    copies = []
    for i, gene in enumerate(genes):
        values = (counts[i], first[i], counts[i] - first[i], *(f"{v:.4f}" for v in (tpm[i], fpkm[i], fpkm_uq[i])))
        rows.append([gene.ensembl, gene.symbol, "protein_coding", *values])
        if gene.symbol == PAR_GENE:
            zeros = (0, 0, 0, "0.0000", "0.0000", "0.0000")
            copies.append([f"{gene.ensembl}_PAR_Y", gene.symbol, "protein_coding", *zeros])
    return "# gene-model: GENCODE v36\n" + _tsv([*rows, *copies])


def masked_mafs(design: Design, outcomes: Outcomes, genes: Sequence[Gene], seed: int) -> Iterable[tuple[str, bytes]]:
    """(patient, gzip bytes) of every mutation file; some patients have none, one has a file without rows."""
    rng = np.random.default_rng([seed, 4])
    frequency = np.array([MUTATION_FREQUENCY.get(gene.symbol, 0.01) for gene in genes])
    has_file = {file.patient_id for file in design.molecular if file.panel == "mut"}
    for i, patient in enumerate(design.patients):
        # A weak burden effect of z2, as proliferation brings mutations.
        odds = frequency / (1 - frequency) * np.exp(0.2 * outcomes.z2[i])
        hits = np.flatnonzero(rng.random(len(genes)) < odds / (1 + odds))
        effects = rng.choice(len(_EFFECTS), hits.size, p=_EFFECT_SHARES)
        rows = [_maf_row(genes[hit], _EFFECTS[effect], patient, rng) for hit, effect in zip(hits, effects, strict=True)]
        if patient in has_file:
            yield patient, _maf_bytes([] if patient in design.empty_maf else rows, patient)


def aliquot(patient: str, sample: str, analyte: str) -> str:
    """A made-up aliquot barcode of a patient, sample ``"01A"`` (tumour) or ``"10A"`` (blood)."""
    return f"{patient}-{sample}-11{analyte}-SIM1-08"


_MAF_COLUMNS = words(
    "Hugo_Symbol Entrez_Gene_Id Center NCBI_Build Chromosome Start_Position End_Position Strand "
    "Variant_Classification Variant_Type Reference_Allele Tumor_Seq_Allele1 Tumor_Seq_Allele2 "
    "dbSNP_RS dbSNP_Val_Status Tumor_Sample_Barcode Matched_Norm_Sample_Barcode "
    "Match_Norm_Seq_Allele1 Match_Norm_Seq_Allele2 Mutation_Status HGVSp_Short t_depth "
    "t_ref_count t_alt_count Gene FILTER"
)


def _maf_row(gene: Gene, effect: str, patient: str, rng: np.random.Generator) -> list[object]:
    start = gene.start + int(rng.integers(gene.length))
    reference, changed = rng.choice(list("ACGT"), 2, replace=False)
    deletion = effect == "Frame_Shift_Del"
    depth = int(rng.integers(40, 200))
    alternative = int(rng.binomial(depth, 0.35))
    codon = int(rng.integers(1, 400))
    change = {_MISSENSE: f"p.R{codon}H", _SILENT: f"p.L{codon}=", "Nonsense_Mutation": f"p.Q{codon}*"}.get(effect, "")
    return [
        *(gene.symbol, 0, "SIM", "GRCh38", gene.chromosome, start, start, "+", effect),
        *("DEL" if deletion else "SNP", reference, reference, "-" if deletion else changed, "novel", ""),
        *(aliquot(patient, "01A", "D"), aliquot(patient, "10A", "D"), "", "", "Somatic", change),
        *(depth, depth - alternative, alternative, gene.ensembl.split(".")[0], "PASS"),
    ]


def _maf_bytes(rows: list[list[object]], patient: str) -> bytes:
    head = (
        "#version gdc-1.0.0\n#filedate 20260101\n#annotation.spec gdc-2.0.0-aliquot-merged-masked\n"
        f"#n.analyzed.samples 1\n#tumor.aliquots.submitter_id {aliquot(patient, '01A', 'D')}\n"
    )
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0) as handle:
        handle.write((head + _tsv([_MAF_COLUMNS, *rows])).encode())
    return buffer.getvalue()


def copy_numbers(design: Design, outcomes: Outcomes, genes: Sequence[Gene], seed: int) -> Iterable[tuple[str, str]]:
    """(patient, text) of every gene-level copy number file: whole numbers, 1.5 % of the cells empty (not covered).

    The copy number of a signal gene is weakly related to z2 (0.3 copies per unit).
    """
    rng = np.random.default_rng([seed, 5])
    signal = np.isin([gene.symbol for gene in genes], sorted(signal_genes()))
    header = words("gene_id gene_name chromosome start end copy_number min_copy_number max_copy_number")
    for i, patient in enumerate(design.patients):
        value = 2 + 0.8 * rng.standard_normal(len(genes)) + np.where(signal, 0.3 * outcomes.z2[i], 0)
        copies = np.clip(np.rint(value), 0, 12).astype(int)
        covered = rng.random(len(genes)) >= 0.015
        broken = rng.random(len(genes)) < 0.02  # a breakpoint inside the gene
        rows: list[Sequence[object]] = [header]
        for k, gene in enumerate(genes):
            place = (gene.chromosome, gene.start, gene.start + gene.length * 8)
            low, high = copies[k], copies[k] + broken[k]
            cells = (copies[k], low, high) if covered[k] else ("", "", "")
            rows.append([gene.ensembl, gene.symbol, *place, *cells])
        yield patient, _tsv(rows)


# -- sample sheet ---------------------------------------------------------------------------------------------
def sample_sheet_tsv(design: Design, md5: dict[str, str]) -> str:
    """The portal's sample sheet with one row per file, in the order of the file ids, and an ``md5`` column.

    Files that a tumour and a normal sample went into (mutations, copy number) name both, as the GDC does.

    Args:
        md5: relative path of every slide and molecular file -> hex digest.
    """
    header = words("File ID|File Name|Data Category|Data Type|Project ID|Case ID|Sample ID|Sample Type|md5", "|")
    kinds = {
        "rna": ("Transcriptome Profiling", "Gene Expression Quantification"),
        "mut": ("Simple Nucleotide Variation", "Masked Somatic Mutation"),
        "cnv": ("Copy Number Variation", "Gene Level Copy Number"),
    }
    rows = []
    for slide in design.slides:
        owner = (slide.patient_id, f"{slide.patient_id}-01Z", "Primary Tumor")
        what = ("Biospecimen", "Slide Image", PROJECT)
        rows.append([slide.file_id, slide.file_name, *what, *owner, md5[f"slides/{slide.file_name}"]])
    for file in design.molecular:
        patient = file.patient_id
        owner = (patient, f"{patient}-01A", "Primary Tumor")
        if file.panel != "rna":
            owner = (
                f"{patient}, {patient}",
                f"{patient}-01A, {patient}-10A",
                "Primary Tumor, Blood Derived Normal",
            )
        rows.append([file.file_id, file.file_name, *kinds[file.panel], PROJECT, *owner, md5[file.path]])
    return _tsv([header, *sorted(rows)])


def _tsv(rows: Iterable[Sequence[object]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)
