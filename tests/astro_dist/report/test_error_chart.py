"""The chart of layer errors."""

from astro.quantization.layer_record import LayerRecord
from astro_dist.report.error_chart import error_chart


def record(name, error):
    return LayerRecord(
        name=name, bits=4, rows=8, columns=8, group_size=8, num_tokens=1, routed_tokens=1, fallback="",
        relative_error=error, beta=0.0, beta_gain=0.0, width_errors={}, group_maximum_ratio=1.0, damping=0.0,
        factorizations=1, seconds={},
    )  # fmt: skip


def test_dense_layers_and_experts_have_lines_of_their_own():
    dense = record("model.layers.0.mlp.up_proj", 0.5)
    experts = [record(f"model.layers.1.mlp.experts.{i}.up_proj", error) for i, error in enumerate((0.1, 0.3))]
    chart = error_chart({0: [dense], 1: experts})
    assert [label.text for label in chart.labels[3:]] == ["experts: up_proj", "up_proj"]
    assert [len(line.points.split()) for line in chart.lines] == [1, 1]
