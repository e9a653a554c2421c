"""Genes of the simulated cohort: real symbols in the six families that the MCAT line of work uses.

Symbols and the family that each is commonly counted to are plain facts; Ensembl ids, positions and lengths of the
simulated files are made up (:mod:`morphome.cohort.gdc_tables`). Standard library only.
"""

from __future__ import annotations


def words(text: str, separator: str = " ") -> tuple[str, ...]:
    """The parts of a text; keeps long lists of names readable."""
    return tuple(text.split(separator))


TUMOUR_SUPPRESSORS = "Tumour suppressors"
ONCOGENES = "Oncogenes"
KINASES = "Protein kinases"
MARKERS = "Cell differentiation markers"
FACTORS = "Transcription factors"
CYTOKINES = "Cytokines and growth factors"

#: Family -> symbols of which it is the first family. The first ten of a signal family carry the latent z2.
FAMILIES: dict[str, tuple[str, ...]] = {
    TUMOUR_SUPPRESSORS: words(
        "TP53 PTEN RB1 APC BRCA1 BRCA2 CDKN2A VHL NF1 NF2 SMAD4 STK11 ATM MLH1 MSH2 MSH6 CDH1 FBXW7 "
        "TSC1 TSC2 WT1 PTCH1 MEN1 BAP1 SETD2 ARID1A KDM6A CHEK2 AXIN1 FAT1 PBRM1 KEAP1 SUFU CYLD"
    ),
    ONCOGENES: words(
        "KRAS NRAS HRAS MYC MYCN CCND1 CCNE1 MDM2 MDM4 BCL2 PIK3CA CTNNB1 BRAF EGFR ERBB2 MET KIT RET "
        "ALK ABL1 AKT1 CDK4 CDK6 JAK2 GNAS GNAQ IDH1 IDH2 NFE2L2 EZH2 SMO FLT3 CRLF2 BCL6"
    ),
    KINASES: words(
        "AURKA AURKB PLK1 CHEK1 BUB1 TTK CDK1 CDK2 WEE1 NEK2 MAPK1 MAPK3 MAP2K1 MAP2K2 RAF1 MTOR LCK "
        "LYN SRC FYN SYK BTK CSK PTK2 AXL IGF1R INSR KDR FLT1 EPHA2 GSK3B ROCK1 DAPK1 PDGFRA"
    ),
    MARKERS: words(
        "CD3D CD3E CD4 CD8A CD8B CD19 MS4A1 CD22 CD27 CD28 CD33 CD34 CD38 CD40 CD44 CD47 CD68 CD69 "
        "CD80 CD86 CD163 CD274 PDCD1 CTLA4 ITGAX ITGAM PECAM1 THY1 ENG NCAM1 PTPRC EPCAM SDC1 FCGR3A"
    ),
    FACTORS: words(
        "FOS JUN RUNX1 RUNX2 GATA3 GATA6 FOXA1 FOXM1 E2F1 E2F3 STAT1 STAT3 SOX2 SOX9 HIF1A NFKB1 RELA "
        "SNAI1 SNAI2 ZEB1 ZEB2 TWIST1 KLF4 TP63 ETS1 MITF PAX8 TCF7L2 LEF1 YY1 ESR1 AR PPARG IRF1"
    ),
    CYTOKINES: words(
        "IL6 CXCL8 VEGFA TGFB1 TNF CCL2 CSF1 CSF2 HGF AREG EGF FGF2 PDGFB IGF1 IGF2 EREG IL1A IL1B "
        "IL2 IL4 IL7 IL10 IL15 IL18 IL33 CCL5 CCL20 CXCL1 CXCL9 CXCL10 CXCL12 LIF SPP1 BMP2"
    ),
}

#: Further memberships, so that the groups overlap a bit as real gene groups do.
ALSO: dict[str, tuple[str, ...]] = {
    KINASES: words("STK11 ATM CHEK2 BRAF EGFR ERBB2 MET KIT RET ALK ABL1 AKT1 CDK4 CDK6 JAK2 FLT3"),
    FACTORS: ("TP53", "WT1", "MYC", "MYCN", "NFE2L2", "BCL6", "SMAD4"),
    MARKERS: ("KIT", "FLT3", "CDH1", "PDGFRA", "KDR"),
    ONCOGENES: ("SRC", "PDGFRA", "FOS", "JUN"),
    CYTOKINES: ("GDF15",),
}

#: Families whose first ten genes load on the planted latent z2.
SIGNAL_FAMILIES = (KINASES, CYTOKINES)
SIGNAL_PER_FAMILY = 10

#: Genes commonly found mutated, with made-up frequencies; the others take 1 %.
MUTATION_FREQUENCY = {
    **{"TP53": 0.45, "PIK3CA": 0.25, "FAT1": 0.18, "ARID1A": 0.18, "KRAS": 0.12, "CDKN2A": 0.15},
    **{"PTEN": 0.12, "RB1": 0.12, "KDM6A": 0.12, "APC": 0.10, "ATM": 0.10, "NF1": 0.08, "EGFR": 0.08},
}


def choose_genes(count: int) -> list[str]:
    """The first ``count`` symbols, taken from the families in turn; beyond the list made-up ones (``SIM0205`` ...)."""
    longest = max(map(len, FAMILIES.values()))
    turn = [genes[rank] for rank in range(longest) for genes in FAMILIES.values() if rank < len(genes)]
    return [*turn[:count], *(f"SIM{number:04d}" for number in range(len(turn) + 1, count + 1))]


def gene_groups(genes: list[str]) -> dict[str, list[str]]:
    """Family -> its members among ``genes``, first members first."""
    known = set(genes)
    return {
        name: [gene for gene in dict.fromkeys((*members, *ALSO.get(name, ()))) if gene in known]
        for name, members in FAMILIES.items()
    }


def signal_genes() -> set[str]:
    """The twenty genes whose expression loads on z2."""
    return {gene for name in SIGNAL_FAMILIES for gene in FAMILIES[name][:SIGNAL_PER_FAMILY]}
