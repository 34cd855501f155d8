"""The engine services that existing gateways drive (smg), over the same front end as the native service."""
