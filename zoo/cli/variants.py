"""`zoo variants`: how much a model minds the alternative alleles of a VCF file."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, existing_file, write_rows
from zoo.cli.sequences import add_batch, check
from zoo.errors import ZooError, nearest

if TYPE_CHECKING:
    from zoo.datamodules.vcf import Variant, VcfFile
    from zoo.train.variants import Effect, VariantScorer

METHODS = ("llr", "masked_marginal", "distance", "upstream")
KEYS = ("chrom", "pos", "ref", "alt")
Labels = Callable[["Variant", str], int | None]
Found = Iterator[tuple["Variant", list["Effect"]]]


def parser() -> Parser:
    command = Parser(
        "variants",
        "Score each alternative allele of a VCF file: single bases, insertions, deletions, several alleles a record.\n"
        "  llr              log-likelihood of the window with ALT less that with REF (causal models)\n"
        "  masked_marginal  log-probability of ALT less that of REF where the alleles are masked (masked models)\n"
        "  distance         1 - cosine of the mean hidden states with REF and with ALT (models without likelihoods)\n"
        "  upstream         log(p_ref / p_alt) of the next base after those before it: GENERator's published score,\n"
        "                   single bases only; above 0 where ALT is less likely, the reverse of llr\n"
        "Windows are read in upper case and stand around the allele; near the end of a sequence they are shifted.\n"
        "Alleles that are no sequence (<DEL>, *, breakends, N) or longer than half a window get no score but a note,\n"
        "as do those beside N for models over k-mers. Others whose window holds N or IUPAC codes are scored, and\n"
        "counted on stderr; with --unknown skip they get a note instead. A REF that is not in the FASTA file is\n"
        "an error. VCF output adds INFO fields to the records as they are.",
        [
            "zoo variants runs/ecoli/artifact --vcf in.vcf.gz --fasta genome.fa.gz -o out.vcf.gz",
            "zoo variants hyenadna-tiny-1k --vcf in.vcf --fasta genome.fa --strand both --window 512 -o out.tsv",
            "zoo variants my-model --vcf clinvar.vcf.gz --fasta hg38.fa --label-info CLNSIG -o scores.tsv",
            "zoo variants my-model --vcf in.vcf --fasta genome.fa --labels truth.tsv --label-column pathogenic",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_argument("--vcf", metavar="FILE", required=True, help="variants, plain or gzip-compressed")
    command.add_argument("--fasta", metavar="FILE", required=True, help="their genome, plain or gzip-compressed")
    command.add_argument("-o", "--out", metavar="FILE", help="VCF or table, by its name: .vcf, .vcf.gz, .tsv, .csv, "
                         ".tsv.gz (default: a table to stdout)")  # fmt: skip
    command.add_argument("--score", choices=METHODS, help="default: the one that fits the model, see above")
    command.add_argument(
        "--strand", choices=("+", "-", "both"), default="+", help="strand that is read; both: the mean"
    )
    command.add_argument("--window", type=int, metavar="BASES", help="default: the windows the model was trained on, "
                         "else its longest input up to 8192, else 1024")  # fmt: skip
    command.add_argument("--unknown", choices=("score", "skip"), default="score",
                         help="windows with letters other than A, C, G, T, see above (default: score)")  # fmt: skip
    labels = command.add_mutually_exclusive_group()
    labels.add_argument(
        "--label-info", metavar="KEY", help="INFO field of labels (ClinVar: CLNSIG): print AUROC, AUPRC"
    )
    labels.add_argument("--labels", metavar="FILE", help="table with the columns chrom, pos, ref, alt and of labels")
    command.add_argument("--label-column", metavar="NAME", default="label", help="that column (default: label)")
    add_batch(command, 64)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    kind = _format(args.out)
    from zoo.datamodules.fasta import Genome
    from zoo.datamodules.vcf import VcfFile
    from zoo.train.vcf_scores import check_all

    file = VcfFile(existing_file(args.vcf, "VCF file"))
    genome = Genome([existing_file(args.fasta, "FASTA file")])
    labels = _labels(args, file)
    check_all(file, genome, labels)
    from zoo.train.variants import DIRECTION, VariantScorer
    from zoo.train.vcf_scores import Labelled, score_variants

    scorer = VariantScorer(
        args.ref, args.score, args.window, args.strand, unknown=args.unknown, batch_size=args.batch_size
    )
    known, notes = Labelled(), Counter[str]()
    found = _watched(score_variants(scorer, file, genome), known, notes, labels, DIRECTION[scorer.method])
    if kind == "vcf":
        _write_vcf(args, file, scorer, found)
    else:
        _write_table(args, found, labels)
    if notes:
        counts = ", ".join(f"{count} {note}" for note, count in notes.most_common())
        print(f"no score for {notes.total()} alleles: {counts}", file=sys.stderr)
    if scorer.beside_unknown:
        print(
            f"{scorer.beside_unknown} alleles were scored in windows with N or other letters than A, C, G and T, which "
            "the model was hardly trained on: --unknown skip leaves them out",
            file=sys.stderr,
        )
    if labels is not None:
        summary = known.summary()
        print(
            f"AUROC {summary['auroc']:.4f}  AUPRC {summary['auprc']:.4f}  "
            f"({summary['positive']} pathogenic, {summary['negative']} benign)",
            file=sys.stdout if args.out else sys.stderr,
        )
    return 0


def _format(out: str | None) -> str:
    if out is None:
        return "table"
    name = out.lower()
    if name.endswith((".vcf", ".vcf.gz")):
        return "vcf"
    if name.endswith((".tsv", ".csv", ".tsv.gz", ".csv.gz")):
        return "table"
    raise ZooError(f"--out must end in .vcf, .vcf.gz, .tsv, .tsv.gz, .csv or .csv.gz, got '{out}'")


def _labels(args: argparse.Namespace, file: VcfFile) -> Labels | None:
    """The label of a record's allele; None when none are asked for."""
    if args.label_info:
        return _info_labels(args.label_info, file)
    if not args.labels:
        return None
    from zoo.datamodules.table import read_table
    from zoo.train.vcf_scores import label_of

    found = read_table(existing_file(args.labels, "table of labels"))
    keys = zip(*(found.column(key, "--labels") for key in KEYS), strict=True)
    values = found.column(args.label_column, "--label-column")
    rows = enumerate(zip(keys, values, strict=True))
    known = {
        (chrom, position, ref.upper(), alt.upper()): label_of(value, found.place(row))
        for row, ((chrom, position, ref, alt), value) in rows
    }
    return lambda variant, alt: known.get((variant.chrom, str(variant.start + 1), variant.ref, alt))


def _info_labels(key: str, file: VcfFile) -> Labels:
    from zoo.train.vcf_scores import label_of

    declared = {line.split("ID=", 1)[1].split(",")[0]: line for line in file.meta if line.startswith("##INFO=<ID=")}
    if key not in declared:
        raise ZooError(f"'{file.path}' declares no INFO field '{key}'" + nearest(key, declared))
    by_allele = ",Number=A," in declared[key]

    def find(variant: Variant, alt: str) -> int | None:
        value = variant.info(key)
        parts = (value or "").split(",")
        if by_allele and len(parts) == len(variant.alts):
            value = parts[variant.alts.index(alt)]
        return label_of(value, variant.place)

    return find


def _watched(found: Found, known: Any, notes: Counter[str], labels: Labels | None, direction: float) -> Found:
    """What passes through, counted."""
    for variant, effects in found:
        for alt, effect in zip(variant.alts, effects, strict=True):
            if effect.note:
                notes[effect.note] += 1
            if labels is not None and effect.score is not None:
                known.add(direction * effect.score, labels(variant, alt))
        yield variant, effects


def _number(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.6g}"


def _write_vcf(args: argparse.Namespace, file: VcfFile, scorer: VariantScorer, found: Found) -> None:
    from zoo.datamodules.vcf import InfoField, header, with_info, written
    from zoo.train.variants import METHODS as MEANING

    name = f"ZOO_{scorer.method.upper()}"
    fields = [
        InfoField(name, "A", "Float", f"{MEANING[scorer.method]}; window {scorer.window}, strand {args.strand}"),
        InfoField("ZOO_NOTE", "A", "String", "Why an allele has no score"),
    ]
    with written(Path(args.out).expanduser()) as out:
        out.write("\n".join(header(file, fields, [f"##zooVariantsModel={args.ref}"])) + "\n")
        for variant, effects in found:
            values = {name: "", "ZOO_NOTE": ""}
            if effects:
                values[name] = ",".join(_number(effect.score, ".") for effect in effects)
            if any(effect.note for effect in effects):
                values["ZOO_NOTE"] = ",".join(effect.note or "." for effect in effects)
            out.write(with_info(variant, values) + "\n")


def _write_table(args: argparse.Namespace, found: Found, labels: Labels | None) -> None:
    header = ["chrom", "pos", "id", "ref", "alt", "score", "ref_value", "alt_value", "note"]
    header += ["label"] if labels else []

    def rows() -> Iterator[list[str]]:
        for variant, effects in found:
            for alt, effect in zip(variant.alts, effects, strict=True):
                row = [variant.chrom, str(variant.start + 1), variant.fields[2], variant.ref, alt]
                row += [_number(value, "") for value in (effect.score, effect.ref, effect.alt)] + [effect.note]
                if labels:
                    label = labels(variant, alt)
                    row.append("" if label is None else str(label))
                yield row

    if args.out is None:
        write_rows(list(rows()), header, None)  # an error shows before the first line
        return
    if not args.out.endswith(".gz"):
        write_rows(rows(), header, args.out)
        return
    import csv

    from zoo.datamodules.vcf import written

    with written(Path(args.out).expanduser()) as out:
        writer = csv.writer(out, delimiter="," if args.out.endswith(".csv.gz") else "\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows())
