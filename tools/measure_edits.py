"""How well models edit unseen scenes of the embedded world: the first object of each is given another colour.

    python tools/measure_edits.py ENCODER [DECODER]

Models, their steps and their guidance scales are those of `bkd edit`. Columns: docs/results.md, "Edits".
"""

from __future__ import annotations

import argparse

import experiment
from measures import table
from results_steps_measures import edit_header, edit_row, judged
from results_steps_runs import drawn_edits

from bkd.edit_plan import Half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("decoder", nargs="?", help="default: the encoder")
    parser.add_argument("--num-inference-steps", type=int, default=50, help="of models that were not halved")
    args = parser.parse_args()
    experiment.start_worker()
    encoder = Half.encoder(args.encoder, None, args.num_inference_steps)
    decoder = Half.decoder(args.decoder or args.encoder, None, args.num_inference_steps)
    drawn = drawn_edits(encoder, decoder)
    title = f"{encoder}; {decoder}"
    row = edit_row(title, [judged(drawn["images"], drawn["again"])])
    print(table(edit_header("encoder and decoder", "colour"), [row]))


if __name__ == "__main__":
    main()
