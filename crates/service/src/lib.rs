//! Services, EndpointSlices and the node become `Rules`; two `Rules` become a difference. Pure.
