"""The losses, described once: what each token adds to them and to their gradients. Every row pass of any mixture is made of these.

p is the teacher's distribution over tokens, q = softmax(logits) the drafter's. Four sums of some f(p, q) over the tokens, and
logarithms of single q, make up all losses. On the logits such a sum has the gradient q * (s - mean of s under q), with the slope
s = df/dq; a constant in it changes nothing and is left out.

Operators, exp and log only: PyTorch runs these functions as they stand, and Triton compiles their source with its own exp and log.
p and q are above 0.
"""

from torch import exp, log


def kl_div(p, q, log_p, log_q):
    """f and s of KL(p || q)."""
    return p * (log_p - log_q), -p / q


def rkl(p, q, log_p, log_q):
    """f and s of KL(q || p)."""
    s = log_q - log_p
    return q * s, s


def jsd(p, q):
    """f and s of (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    m = (p + q) * 0.5
    s = log(q / m) * 0.5
    return p * log(p / m) * 0.5 + q * s, s


def overlap(p, q):
    """f of alpha = sum min(p, q), and s of 1 - alpha. Where q = p, f has a kink, and counts as where q < p."""
    smaller = q <= p
    return smaller * q + (q > p) * p, smaller * -1.0


def of_alpha(alpha, kl_div, tv, nla, lk_hybrid):
    """How a row's alpha and the weights of four losses act together.

    Returns:
        of_kl: how many times the row has kl_div.
        of_tv: how many times its gradient has that of 1 - alpha, which that of -log alpha is a multiple of.
        loss: what tv, nla and, kl_div apart, lk_hybrid add to its loss.
    """
    part = exp(alpha * -3.0)  # of lk_hybrid: this much kl_div, the rest tv; a constant of the row
    safe = alpha + (alpha < 1e-5) * (1e-5 - alpha)  # below, nla is that of 1e-5, and constant
    of_tv = tv + lk_hybrid * (1.0 - part)
    slope = of_tv + nla * ((alpha >= 1e-5) / safe)
    return kl_div + lk_hybrid * part, slope, of_tv * (1.0 - alpha) - nla * log(safe)
