"""Has a language model judge the answers of an evaluation, through any OpenAI-compatible server.

    python -m tools.judge out/eval/slake_en_test --protocol=binary --model=gpt-4o-2024-08-06
    python -m tools.judge out/eval/slake_en_test --protocol=pefomed5 --model=qwen \
        --base_url=http://127.0.0.1:8000/v1 --structured --human=labels.csv

Reads predictions.jsonl and writes judgements.jsonl and judge.json next to it. Every reply is kept in
judge_cache.jsonl there: if interrupted, the same command resumes, and nothing is asked twice. The key
is only read from OPENAI_API_KEY. --dry_run asks nothing and shows a prompt.
"""

import pathlib
import sys

import tqdm
from absl import app, flags

from paligemma_med.cli import command
from paligemma_med.evaluation import predictions, results
from paligemma_med.judge import criteria, figures, judge, replies
from paligemma_med.pp import command_line, json_text


def settings_from(text, structured, protocol) -> dict:
    """--settings and --structured as a dict; ValueError says what is wrong with them."""
    settings = json_text.parse(text, f"--settings is {text!r:.200}", "a JSON object", root=dict)
    if structured:
        settings["response_format"] = criteria.schema(criteria.PROTOCOLS[protocol].scores)
    return settings


def dry_run(folder, protocol, *, model, num_questions, cache, **kw) -> None:
    """Prints how much there is to ask, and the first of it."""
    folder = pathlib.Path(folder)
    rows = judge.choose(predictions.read(folder / results.PREDICTIONS, judge.NEEDED), num_questions)
    lines, requests = judge.plan(rows, protocol, model=model, **kw)
    with replies.Cache(cache or folder / judge.CACHE) as opened:
        there = sum(opened.score(key) is not None for key in requests)
    for message in next(iter(requests.values()))(0):
        print(f"--- {message['role']}\n{message['content']}\n")
    print(
        f"--- {len(rows):,} questions, {sum(len(x['keys']) for x in lines):,} answers, "
        f"{len(requests):,} different texts; {there:,} are judged, {len(requests) - there:,} "
        "would be asked."
    )


@command
def main(argv) -> None:
    if len(argv) != 2:
        raise app.UsageError(f"Give the folder of one evaluation; found {argv[1:]}.")
    v = flags.FLAGS
    kw = dict(
        model=v.model,
        num_questions=v.num_questions,
        cache=v.cache,
        who=tuple(v.who),
        samples=1 if v.samples == "first" else None,
        settings=settings_from(v.settings, v.structured, v.protocol),
    )
    if v.dry_run:
        dry_run(argv[1], v.protocol, **kw)
        return
    # In a log each state of the bar is a line of its own.
    every = 0.1 if sys.stderr.isatty() else 30
    with tqdm.tqdm(desc="judge", unit=" texts", mininterval=every) as bar:

        def settled(total):
            bar.total = total
            bar.update()

        entry = judge.judge_folder(
            argv[1],
            v.protocol,
            human=v.human,
            price_in=v.price_in,
            price_out=v.price_out,
            base_url=v.base_url,
            concurrency=v.concurrency,
            requests_per_minute=v.requests_per_minute,
            timeout=v.timeout,
            max_replies=v.max_replies,
            retry_unusable=v.retry_unjudged,
            progress=settled,
            **kw,
        )
    print(figures.format_table(entry))
    if entry["faults"]:
        print("Faults got over: " + ", ".join(f"{n} {k}" for k, n in entry["faults"].items()) + ".")
    print(f"Written to {argv[1]}: {judge.JUDGEMENTS}, {judge.SUMMARY}.")


if __name__ == "__main__":
    names = tuple(criteria.PROTOCOLS)
    flags.DEFINE_enum("protocol", "binary", names, "Criterion; docs/judge.md has their sources.")
    flags.DEFINE_string("model", None, "The judge, as the server calls it.", required=True)
    flags.DEFINE_string("base_url", None, "Server, http(s)://…/v1; default: OpenAI's own.")
    flags.DEFINE_enum("samples", "all", ("all", "first"), "Which answers of a question to judge.")
    flags.DEFINE_list("who", ["model"], "Whose answers: model, and controls of the predictions.")
    flags.DEFINE_integer("num_questions", None, "Judge so many, chosen by their ids; default: all.")
    command_line.define_path("human", None, "CSV question_id,label[,sample] to compare the judge with.")
    command_line.define_path("cache", None, "File of replies; default: judge_cache.jsonl in the folder.")
    flags.DEFINE_string(
        "settings",
        "{}",
        "JSON of request arguments, on top of temperature 0 and max_tokens 32; "
        'null takes one away: {"max_tokens": null, "max_completion_tokens": 2000}.',
    )
    flags.DEFINE_bool("structured", False, "Ask the server to hold replies to a JSON schema.")
    flags.DEFINE_integer("concurrency", 8, "Requests under way at a time.", lower_bound=1)
    flags.DEFINE_float("requests_per_minute", None, "Begin at most so many; default: no limit.")
    flags.DEFINE_float("timeout", 60.0, "Seconds for a reply.")
    flags.DEFINE_integer("max_replies", 4, "Unusable replies before an answer stays unjudged.")
    flags.DEFINE_bool("retry_unjudged", False, "Ask again what earlier runs left unjudged.")
    flags.DEFINE_float("price_in", None, "Price of a million prompt tokens.")
    flags.DEFINE_float("price_out", None, "Price of a million completion tokens.")
    flags.DEFINE_bool("dry_run", False, "Ask nothing; show what would be asked.")
    app.run(main, flags_parser=command_line.parse_flags)
