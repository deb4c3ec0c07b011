"""What the local tasks do with a document and an answer; lmms-eval finds this file beside their YAML."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from PIL import Image


def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def question(doc):
    return doc["question"]


def choices(doc):
    return [doc[f"choice_{letter}"] for letter in "abcd"]


def right_choice(doc):
    return "ABCD".index(doc["answer"])


def seed_process_results(doc, results):
    """The letter of the option that was said."""
    said = dict(zip(choices(doc), "ABCD", strict=True)).get(results[0], "")
    result = {"pred": said, "answer": doc["answer"]}
    return {f"seed_{doc['data_type']}": result, "seed_all": result}


def share_right(results):
    return mean(one["pred"] == one["answer"] for one in results)


def mme_process_results(doc, results):
    """Yes when what was said is what is claimed."""
    said = "Yes" if results[0] == doc["claim"] else "No"
    right = said == doc["answer"]
    return {"mme_perception_score": {"question_id": doc["question_id"], "category": doc["category"], "score": right}}


def mme_score(results):
    """Per category, the share of right answers and of pictures with both right, in per cent; summed."""
    by_category = defaultdict(lambda: defaultdict(list))
    for one in results:
        by_category[one["category"]][one["question_id"]].append(one["score"])
    return sum(
        100 * mean(score for scores in by_picture.values() for score in scores)
        + 100 * mean(all(scores) for scores in by_picture.values())
        for by_picture in by_category.values()
    )


def mmvp_process_results(doc, results):
    said = dict(zip(doc["options"], "AB", strict=True)).get(results[0], "")
    result = {"pair": doc["Index"] // 2, "right": said == doc["answer"]}
    return {"mmvp_accuracy": result, "mmvp_pair_accuracy": result}


def mmvp_accuracy(results):
    return mean(one["right"] for one in results)


def mmvp_pair_accuracy(results):
    pairs = defaultdict(list)
    for one in results:
        pairs[one["pair"]].append(one["right"])
    return mean(all(both) for both in pairs.values())


def llava_process_results(doc, results):
    return {"gpt_eval_llava_all": {"category": doc["category"], "score": results[0] == doc["gpt_answer"]}}


def llava_all(results):
    return mean(one["score"] for one in results)


def choice_process_results(doc, results):
    likelihoods = [log_probability for log_probability, _ in results]
    return {"acc": likelihoods.index(max(likelihoods)) == right_choice(doc)}
