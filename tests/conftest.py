"""Every test runs in float64 unless it says otherwise, with strict promotion, on two (pretended) CPU devices."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
