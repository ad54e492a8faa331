"""BERTScore by a model of the user's choice: words compared by their embeddings in context instead of their letters.

Source: Zhang et al., BERTScore: evaluating text generation with BERT (ICLR 2020, arXiv:1904.09675), greedy matching, F1,
without inverse document frequencies and without rescaling; layers as the authors chose them by correlation with people.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sonovqa import torchvision_ops
from sonovqa.cli import UserError
from sonovqa.metrics import Score, mean

#: The hidden layer the authors found best (table of ``bert_score`` 0.3.13); other models: their last one.
LAYERS = {"roberta-large": 17, "roberta-base": 10, "bert-base-uncased": 9, "bert-large-uncased": 18,
          "distilbert-base-uncased": 5, "microsoft/deberta-xlarge-mnli": 40, "allenai/scibert_scivocab_uncased": 8}  # fmt: skip
BATCH = 64  # distinct texts embedded together


def wording(model: str | None) -> dict[str, BertScore]:
    """For `scoring.score`: BERTScore by its full name, which says the model; empty for ``None``."""
    made = None if model is None else BertScore(model)
    return {} if made is None else {made.name: made}


class BertScore:
    """BERTScore F1 of texts.

    Args:
        model: a model folder or a hub id that is in the local cache. Nothing is downloaded.

    Raises:
        UserError: if the model is not on this machine, or is none.
    """

    def __init__(self, model: str):
        torchvision_ops.declare()  # before the first import of transformers, which notes what is installed
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            self._model = AutoModel.from_pretrained(model, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as fault:
            told = " ".join(str(fault).split())[:100]
            way_out = f"a model folder or a downloaded hub id; nothing is fetched here: hf download {model}"
            raise UserError(f"--bertscore; {model}: {told}; {way_out}") from None
        self.layer = LAYERS.get(model, self._model.config.num_hidden_layers)
        self.name = f"BERTScore F1 ({model}, layer {self.layer}, no idf, not rescaled)"
        self._embedded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, references: Sequence[str], texts: Sequence[str]) -> Score:
        """The mean F1 over rows; an empty text scores 0."""
        self._embed(sorted({text for text in (*references, *texts) if text.strip() and text not in self._embedded}, key=len))
        pairs = {pair: self._f1(*pair) for pair in set(zip(references, texts, strict=True))}
        return mean([pairs[pair] for pair in zip(references, texts, strict=True)], bounds=(-1.0, 1.0))

    def _embed(self, texts: list[str]) -> None:
        """Unit vectors of every token ``[t, h]`` and which tokens count: special ones may be matched but are not averaged."""
        import torch

        for at in range(0, len(texts), BATCH):
            part = texts[at : at + BATCH]
            most = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings - 2)
            made = self._tokenizer(
                part, padding=True, truncation=True, max_length=most, return_tensors="pt", return_special_tokens_mask=True
            )
            special = made.pop("special_tokens_mask").bool()
            with torch.inference_mode():
                hidden = self._model(**made, output_hidden_states=True).hidden_states[self.layer]
            hidden = torch.nn.functional.normalize(hidden.float(), dim=-1)
            for text, vectors, seen, apart in zip(part, hidden, made["attention_mask"].bool(), special, strict=True):
                self._embedded[text] = (vectors[seen].numpy(), (~apart[seen]).numpy())

    def _f1(self, reference: str, text: str) -> float:
        if not reference.strip() or not text.strip():
            return 0.0
        (a, counts_a), (b, counts_b) = self._embedded[reference], self._embedded[text]
        alike = a @ b.T
        recall, precision = alike.max(axis=1)[counts_a].mean(), alike.max(axis=0)[counts_b].mean()
        return float(2 * precision * recall / (precision + recall))
