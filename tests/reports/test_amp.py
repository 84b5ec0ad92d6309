"""Who clips between backward and step needs unscaled gradients: Lightning-AI/pytorch-lightning#15501 and #21435."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, make_params


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_step_unscales_only_if_it_was_asked_to(case: Case) -> None:
    def new(**options: object) -> torch.optim.Optimizer:
        return case.ours(make_params([(3, 4)], torch.float32), **case.kwargs, **options)

    def supports(optimizer: torch.optim.Optimizer) -> bool:
        return getattr(optimizer, "_step_supports_amp_scaling", False)

    assert not supports(new())
    assert supports(new(fused=True))
    assert supports(new(max_grad_norm=1.0))
    if case.is_torchs and "fused" in case.theirs.__init__.__code__.co_varnames:
        assert not supports(case.theirs(make_params([(3, 4)], torch.float32), **case.kwargs))
        if case.theirs is not torch.optim.Adagrad:  # torch's own, fused, does not say so before 2.7
            assert supports(case.theirs(make_params([(3, 4)], torch.float32), **case.kwargs, fused=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips(precision: str, tmp_path: object) -> None:
    lightning = pytest.importorskip("lightning")
    import fusedopt

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fusedopt.AdamW(self.parameters(), lr=0.1)

    model = Model()
    before = model.layer.weight.detach().clone()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        gradient_clip_val=0.5,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(model, data)
    assert not torch.equal(model.layer.weight, before)
