"""Which variants make a gene mutated: classes as MAF files name them, and the Sequence Ontology terms behind them.

The classes are those of the MAF specification; a term is put into the class that annotation tools give to it. Of
several terms ("missense_variant;splice_region_variant") the most severe one decides, in the order in which Ensembl
ranks them.
"""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError, MorphomeWarning

#: Variant classes that change the protein; everything else (Silent, UTR, intron, flank, RNA) does not count. The last
#: two lines are Oncotator's words for a lost start or stop.
PROTEIN_CHANGING = frozenset(
    {
        *("Missense_Mutation", "Nonsense_Mutation", "Nonstop_Mutation", "Translation_Start_Site"),
        *("Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del", "In_Frame_Ins", "Splice_Site"),
        *("Start_Codon_SNP", "Start_Codon_Del", "Start_Codon_Ins"),
        *("Stop_Codon_Del", "Stop_Codon_Ins"),
    }
)
#: Classes after which the protein ends early or is spliced otherwise.
TRUNCATING = frozenset({"Nonsense_Mutation", "Frame_Shift_Del", "Frame_Shift_Ins", "Splice_Site"})
#: Further classes that MAF files hold.
_OTHER_CLASSES = frozenset(
    {
        *("Silent", "Splice_Region", "Intron", "5'UTR", "3'UTR", "5'Flank", "3'Flank", "IGR", "RNA", "lincRNA"),
        *("De_novo_Start_InFrame", "De_novo_Start_OutOfFrame", "Targeted_Region", "Fusion", "Unknown"),
    }
)
_SETS = {"protein_changing": PROTEIN_CHANGING, "truncating": TRUNCATING}
_FRAME_SHIFT, _IN_FRAME = ("Frame_Shift_Del", "Frame_Shift_Ins"), ("In_Frame_Del", "In_Frame_Ins")
#: Sequence Ontology terms, most severe first, and the classes they fall into.
_TERMS: dict[str, tuple[str, ...]] = {
    "transcript_ablation": ("Splice_Site",),
    "exon_loss_variant": ("Splice_Site",),
    "splice_acceptor_variant": ("Splice_Site",),
    "splice_donor_variant": ("Splice_Site",),
    "stop_gained": ("Nonsense_Mutation",),
    "frameshift_variant": _FRAME_SHIFT,
    "stop_lost": ("Nonstop_Mutation",),
    "start_lost": ("Translation_Start_Site",),
    "initiator_codon_variant": ("Translation_Start_Site",),
    "inframe_insertion": ("In_Frame_Ins",),
    "conservative_inframe_insertion": ("In_Frame_Ins",),
    "disruptive_inframe_insertion": ("In_Frame_Ins",),
    "inframe_deletion": ("In_Frame_Del",),
    "conservative_inframe_deletion": ("In_Frame_Del",),
    "disruptive_inframe_deletion": ("In_Frame_Del",),
    "missense_variant": ("Missense_Mutation",),
    "protein_altering_variant": _IN_FRAME,
    "splice_donor_5th_base_variant": ("Splice_Region",),
    "splice_region_variant": ("Splice_Region",),
    "splice_donor_region_variant": ("Splice_Region",),
    "splice_polypyrimidine_tract_variant": ("Splice_Region",),
    "incomplete_terminal_codon_variant": ("Silent",),
    "start_retained_variant": ("Silent",),
    "stop_retained_variant": ("Silent",),
    "synonymous_variant": ("Silent",),
    "coding_sequence_variant": ("Missense_Mutation",),
    "mature_miRNA_variant": ("RNA",),
    "5_prime_UTR_premature_start_codon_gain_variant": ("5'UTR",),
    "5_prime_UTR_variant": ("5'UTR",),
    "3_prime_UTR_variant": ("3'UTR",),
    "non_coding_transcript_exon_variant": ("RNA",),
    "non_coding_exon_variant": ("RNA",),
    "exon_variant": ("RNA",),
    "intron_variant": ("Intron",),
    "intragenic_variant": ("Intron",),
    "NMD_transcript_variant": ("Silent",),
    "non_coding_transcript_variant": ("RNA",),
    "nc_transcript_variant": ("RNA",),
    "upstream_gene_variant": ("5'Flank",),
    "downstream_gene_variant": ("3'Flank",),
    "TF_binding_site_variant": ("IGR",),
    "regulatory_region_variant": ("IGR",),
    "intergenic_variant": ("IGR",),
    "intergenic_region": ("IGR",),
}
_RANK = {term.lower(): (rank, term) for rank, term in enumerate(_TERMS)}
KNOWN = PROTEIN_CHANGING | _OTHER_CLASSES | frozenset(_TERMS)
_CLASSES = {name.lower(): name for name in PROTEIN_CHANGING | _OTHER_CLASSES}


def severest(effect: str) -> str:
    """The class, or the most severe of the terms, that an effect names, in any case; an unknown word as it is."""
    words = [word.strip() for word in re.split(r"[;,&|]", effect) if word.strip()]
    ranked = sorted(_RANK[word.lower()] for word in words if word.lower() in _RANK)
    named = [_CLASSES[word.lower()] for word in words if word.lower() in _CLASSES]
    return ranked[0][1] if ranked else (named or words or ["(empty)"])[0]


@dataclass
class Consequences:
    """The rule of a configuration, and a count of the variants it has kept and passed over, by class.

    Attributes:
        name: as configured: ``protein_changing``, ``truncating``, ``all`` or ``list``.
        classes: classes and terms that count; None: all.
        kept: variants that count, by class.
        passed_over: the others, by class (or by ``status ...``).
        not_known: those of ``passed_over`` whose class nothing knows.
    """

    name: str
    classes: frozenset[str] | None
    kept: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    not_known: Counter[str] = field(default_factory=Counter)

    def counts(self, effect: str) -> bool:
        """True when a variant of this class, or with these terms, makes a gene mutated."""
        if self.classes is None:
            return True
        wanted = self._lowered
        found = severest(effect)
        return any(name.strip().lower() in wanted for name in (effect, found, *_TERMS.get(found, ())))

    @functools.cached_property
    def _lowered(self) -> frozenset[str]:
        return frozenset(name.lower() for name in self.classes or ())

    def tally(self, effects: Iterable[str]) -> list[bool]:
        """:meth:`counts` of every effect, counted by class."""
        keep = []
        known: dict[str, tuple[bool, str]] = {}
        for effect in effects:
            if effect not in known:
                known[effect] = (self.counts(effect), severest(effect))
            good, name = known[effect]
            (self.kept if good else self.passed_over)[name] += 1
            if not good and name not in KNOWN:
                self.not_known[name] += 1
            keep.append(good)
        return keep

    def check(self, setting: str) -> None:
        """Refuse a listed class that is neither known nor in the files; warn of unknown classes that the files hold.

        Raises:
            MorphomeError: naming the setting and near classes.
        """
        if self.not_known:
            names = sorted(self.not_known, key=lambda name: (-self.not_known[name], name))
            shown = few_names([f"'{name}' ({self.not_known[name]})" for name in names])
            text = f"{setting}: {sum(self.not_known.values())} variants of classes that are not known do not count: "
            warnings.warn(
                MorphomeWarning(f"{text}{shown}; list those that are to count in {setting}.consequences"), stacklevel=3
            )
        if self.name != "list" or self.classes is None:
            return
        having = KNOWN | set(self.kept) | set(self.passed_over)
        lowered = {name.lower() for name in having}
        for name in sorted(name for name in self.classes if name.lower() not in lowered):
            near = difflib.get_close_matches(name, sorted(having), 3, 0.5)
            raise MorphomeError(
                f"{setting}.consequences: '{name}' is no class of variants"
                + (f"; near: {', '.join(near)}" if near else ""),
                "name classes as MAF files do (Missense_Mutation), or set protein_changing, truncating or all",
            )

    def notes(self) -> dict[str, Any]:
        """Rule and counts for a reader."""
        return {
            "consequences": self.name,
            "rule_for_mutated": sorted(self.classes) if self.classes is not None else "every variant listed",
            "variants_kept": dict(sorted(self.kept.items())),
            "variants_passed_over": dict(sorted(self.passed_over.items())),
            "variants_of_classes_not_known": dict(sorted(self.not_known.items())),
        }

    @property
    def unit(self) -> str:
        """What a 1 says."""
        words = {"protein_changing": "protein-changing variant", "truncating": "truncating variant", "all": "variant"}
        return f"1 = {words.get(self.name, 'variant of a listed class')}"


def consequences(value: str | Sequence[str] | None) -> Consequences:
    """The rule that ``molecular.mut.consequences`` names (default ``protein_changing``).

    Raises:
        MorphomeError: a word that is no rule.
    """
    if value is None:
        value = "protein_changing"
    if not isinstance(value, str):
        return Consequences("list", frozenset(value))
    if value == "all":
        return Consequences("all", None)
    if value not in _SETS:
        raise MorphomeError(
            f"molecular.mut.consequences: '{value}' is no rule", f"one of {', '.join(_SETS)}, all, or a list of classes"
        )
    return Consequences(value, _SETS[value])
