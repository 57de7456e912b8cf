"""How far back does a gradient reach? Measured for five recurrent layers, before any training.

The gradient of the last output with respect to the input d steps before it: a sigmoid multiplies it by at most a
quarter at every step, tanh lets it fade, ReLU lets it fade or explode as its weights will have it; the additive cells
of LSTM and GRU carry it on, the further the nearer the forget gate is to 1 (Hochreiter 1991; Bengio et al. 1994;
Gers et al. 2000).

    python examples/vanishing.py         # a few seconds, no data
"""

import torch

import fastseq
from fastseq.models import gradient_by_distance
from run import command_line, picture, result

DISTANCE = 100

SigmoidRNN = fastseq.cell("SigmoidRNN", lambda x, h, state, params: (torch.sigmoid(x + h),), gates=1)


def main() -> None:
    parser = command_line(__doc__, steps=DISTANCE)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    size, made = 64, {"batch_first": True, "device": options.device}
    layers = {
        "RNN, sigmoid": SigmoidRNN(size, size, **made),
        "RNN, tanh": fastseq.RNN(size, size, **made),
        "RNN, ReLU": fastseq.RNN(size, size, nonlinearity="relu", **made),
        "GRU": fastseq.GRU(size, size, **made),
        "LSTM": fastseq.LSTM(size, size, **made),
        "LSTM, forget bias 3": fastseq.LSTM(size, size, forget_bias=3.0, **made),
    }
    with (
        torch.no_grad()
    ):  # ReLU's weights so that on average a vector keeps its length (Le et al. 2015; He et al. 2015)
        torch.nn.init.orthogonal_(layers["RNN, ReLU"].weight_hh_l0, gain=2**0.5)
    x = torch.randn(64, options.steps, size, device=options.device)
    norms = {name: gradient_by_distance(layer, x) for name, layer in layers.items()}
    print(f"{'steps back':20}" + "".join(f"{d:>10}" for d in (1, 10, 30, options.steps - 1)))
    for name, norm in norms.items():
        print(f"{name:20}" + "".join(f"{norm[d] / norm[0]:10.1e}" for d in (1, 10, 30, options.steps - 1)))
    picture(
        options.output / "vanishing.png", {name: (norm / norm[0]).tolist() for name, norm in norms.items()},
        title="Gradient of the last output", xlabel="steps back", ylabel="length, relative", yscale="log",
        ylim=(1e-12, 1e2),
    )  # fmt: skip
    reach = {name: int((norm > 1e-3 * norm[0]).sum()) for name, norm in norms.items()}
    print("steps until a thousandth is left: " + ", ".join(f"{name} {steps}" for name, steps in reach.items()))
    result("LSTM's reach over tanh's", reach["LSTM, forget bias 3"] / reach["RNN, tanh"])


if __name__ == "__main__":
    main()
