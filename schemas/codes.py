"""Tables of the codes in Parquet columns. A code is an index into its table; 0 of pos and ent_type means none.

Never reorder a table or reuse a code: datasets on disk hold the numbers.
"""

LEARN, DELEGATE, IGNORE = 0, 1, 2
LABELS: tuple[str, ...] = ("learn", "delegate", "ignore")

# Universal Dependencies' tags, and spaCy's SPACE.
POS: tuple[str, ...] = (
    "",
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
    "SPACE",
)

# OntoNotes' entity types; OTHER for a label of a pipeline that has more.
ENT_TYPES: tuple[str, ...] = (
    "",
    "CARDINAL",
    "DATE",
    "EVENT",
    "FAC",
    "GPE",
    "LANGUAGE",
    "LAW",
    "LOC",
    "MONEY",
    "NORP",
    "ORDINAL",
    "ORG",
    "PERCENT",
    "PERSON",
    "PRODUCT",
    "QUANTITY",
    "TIME",
    "WORK_OF_ART",
    "OTHER",
)
