//! The methods that can be called by Connect, from their descriptors.

use std::{collections::HashMap, sync::Arc};

use prost_reflect::{
    DescriptorPool, MessageDescriptor, MethodDescriptor, prost_types::method_options::IdempotencyLevel,
};

/// Methods by their paths.
#[derive(Debug)]
pub(in crate::server) struct Methods(HashMap<String, Arc<Method>>);

#[derive(Debug)]
pub(super) struct Method {
    descriptor: MethodDescriptor,
    safe: bool,
}

impl Methods {
    /// All methods of a pool.
    pub(in crate::server) fn of(pool: &DescriptorPool) -> Self {
        let services = pool.services().collect::<Vec<_>>();
        let methods = services.iter().flat_map(prost_reflect::ServiceDescriptor::methods);
        let by_path = methods.map(|method| {
            let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
            (path, Arc::new(Method::new(method)))
        });
        Self(by_path.collect())
    }

    pub(super) fn get(&self, path: &str) -> Option<Arc<Method>> {
        self.0.get(path).cloned()
    }
}

impl Method {
    fn new(descriptor: MethodDescriptor) -> Self {
        let safe = descriptor
            .method_descriptor_proto()
            .options
            .as_ref()
            .is_some_and(|options| options.idempotency_level() == IdempotencyLevel::NoSideEffects);
        Self { descriptor, safe }
    }

    /// Whether a request and an answer are one message each.
    pub(super) fn is_unary(&self) -> bool {
        !self.descriptor.is_client_streaming() && !self.descriptor.is_server_streaming()
    }

    pub(super) fn is_bidirectional(&self) -> bool {
        self.descriptor.is_client_streaming() && self.descriptor.is_server_streaming()
    }

    /// Whether a request may have any number of messages.
    pub(super) fn takes_many(&self) -> bool {
        self.descriptor.is_client_streaming()
    }

    /// Whether it can be called by GET.
    pub(super) fn is_safe(&self) -> bool {
        self.safe && self.is_unary()
    }

    pub(super) fn input(&self) -> MessageDescriptor {
        self.descriptor.input()
    }

    pub(super) fn output(&self) -> MessageDescriptor {
        self.descriptor.output()
    }
}
